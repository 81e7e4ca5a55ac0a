"""What dropping image tokens saves, and what it costs.

The first table: a vision transformer in ViT-B's shape at several keep rates against timm's own forward of the same
blocks: tokens behind each compressing layer, floating-point operations as torch counts them, and time, measured in
alternating rounds. The second: the method ``guided`` trained on drawn scenes (the learning proof's, see learning.py) at
several keep rates, scored on combinations that it has never seen. At each rate it is trained twice: judged pairs are
compressed under image and text (half and half, the default), or by the image alone. Matching is asked of each scene
with its own caption and with those of scenes that differ in one attribute, and so is the contrast, by cosine.

    python benchmarks/compression.py --json compression.json

The JSON is a list, one object for each keep rate of the first table: ``keep_rate``, ``flops_ratio`` and ``time_ratio``
to the plain transformer, ``tokens``; where the rate was trained too, its quality (``scenes_...``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import _passive  # noqa: F401 - before torch
import torch
from _steps import alternate, flops, table
from learning import GRID, WIDTH, Pictures, _batch, _chosen, _see, _train, auc

from isthmus.compat import ensure_torchvision
from isthmus.config import CompressionConfig, FusionConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.data.sources.compositions import ATTRIBUTES, neighbours, split_scenes
from isthmus.evaluation.retrieval import retrieve
from isthmus.methods.batching import tokenise
from isthmus.methods.guided import Guided
from isthmus.methods.guided_config import GuidedConfig
from isthmus.methods.parts import seeded
from isthmus.models.compressible import CompressibleTransformer, new_transformer
from isthmus.models.dual_stream import DualStream
from isthmus.testing.words import word_tokenizer

ensure_torchvision()
import timm  # noqa: E402

KEEP_RATES = (1.0, 0.9, 0.7, 0.5, 0.3)
TRAINED = (1.0, 0.7, 0.5, 0.3)
LAYERS = (3, 6, 9)  # EViT's
ENCODER_STEPS = 220  # of the frozen network that sees the scenes


def main() -> None:
    """Measure, train, print both tables, and write the first where ``--json`` says."""
    options = _options()
    started = time.perf_counter()
    rows = measure(options.batch, options.rounds)
    _show_cost(rows)
    if options.steps:
        trained = quality(options.steps, options.seed)
        _show_quality(trained)
        by_rate = {found.pop("keep_rate"): found for found in trained}
        for row in rows:
            row |= {f"scenes_{name}": value for name, value in by_rate.get(row["keep_rate"], {}).items()}
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ cost


def measure(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Operations and seconds of a forward pass at each rate, as shares of the plain transformer's."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    pixels = torch.randn(batch, 3, 224, 224)
    embed = torch.nn.Sequential(plain.patch_embed)

    def trunk() -> torch.Tensor:
        return plain.norm_pre(plain._pos_embed(embed(pixels)))

    towers = {
        rate: CompressibleTransformer(
            CompressionConfig(layers=LAYERS, keep=(rate,)), None, plain.blocks, plain.norm, 196, 1, True
        ).eval()
        for rate in KEEP_RATES
    }
    with torch.inference_mode():
        assert torch.equal(towers[1.0](trunk()).tokens_BSC, plain.forward_features(pixels)), "not the same transformer"
        work = {f"{rate}": (lambda tower=tower: tower(trunk())) for rate, tower in towers.items()}
        work["plain"] = lambda: plain.forward_features(pixels)
        operations = {name: flops(call) for name, call in work.items()}
        seconds = alternate(work, rounds)
    return [
        {
            "keep_rate": rate,
            "tokens": [step.left for step in tower.schedule()],
            "flops_ratio": round(operations[f"{rate}"] / operations["plain"], 4),
            "time_ratio": round(seconds[f"{rate}"] / seconds["plain"], 4),
            "seconds": round(seconds[f"{rate}"], 4),
        }
        for rate, tower in towers.items()
    ]


def _show_cost(rows: list[dict[str, Any]]) -> None:
    columns = ("keep rate", "tokens", "operations", "time", "time saved / operations saved")
    shown = []
    for row in rows:
        saved = 1 - row["flops_ratio"]
        share = f"{(1 - row['time_ratio']) / saved:.2f}" if saved > 0.01 else "-"
        tokens = " ".join(["196", *(str(n) for n in row["tokens"])])
        shown.append((f"{row['keep_rate']}", tokens, f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}", share))
    table("ViT-B/16 at 224 px, forward, to timm's own", columns, shown)


# --------------------------------------------------------------------------------------------------- quality


def quality(steps: int, seed: int) -> list[dict[str, Any]]:
    """Retrieval and matching on held-out scenes after the same training at each rate."""
    torch.manual_seed(seed)
    split = split_scenes(0.2, seed)
    train, heldout, _ = _see(split, ENCODER_STEPS, seed)
    tokenizer = word_tokenizer([text for scene in split.train for text in scene.captions()])
    out = []
    for rate in TRAINED:
        found: dict[str, Any] = {"keep_rate": rate}
        for name, balance in (("", 0.5), ("unguided_", 1.0)):
            if rate == 1 and balance == 1:
                continue  # nothing is dropped: there is nothing to guide
            module = _guided(rate, balance, steps, tokenizer, seed)
            _train(module, lambda step, m=module: _pairs(m, train, step, seed), steps, 1e-3, lambda _: None)
            found |= {f"{name}{key}": value for key, value in _score(module, heldout, seed).items()}
        out.append(found)
    return out


def _guided(rate: float, balance: float, steps: int, tokenizer: Any, seed: int) -> Guided:
    compression = CompressionConfig(
        layers=(0, 1) if rate < 1 else (), keep=(rate,), warmup_steps=steps // 4, shrink_steps=steps // 4,
        **({"balance": balance} if rate < 1 else {}),
    )  # fmt: skip
    fusion = FusionConfig(
        text_layers=2, fusion_layers=2, width=128, heads=4, feed_forward=512, dropout=0.0, embed=64, init=None
    )
    config = GuidedConfig(compression=compression, fusion=fusion, pairs_every=1, mlm_every=4)
    with seeded(seed):
        image = new_transformer(
            compression, WIDTH + 2 * GRID, GRID * GRID, layers=2, width=128, heads=4, feed_forward=512,
            class_token=True, dropout=0.0,
        )  # fmt: skip
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        streams = DualStream(image, fusion, len(tokenizer), 64, special)
        return Guided(config, None, streams, tokenizer, LocalComm(), seed)


def _pairs(module: Guided, pictures: Pictures, step: int, seed: int) -> Batch:
    rows, scenes, features, generator = _chosen(pictures, step, seed)
    ids, mask = tokenise(module.tokenizer, [generator.choice(scene.captions()) for scene in scenes], 32)
    return _batch(rows, features, step, ids_BT=ids, mask_BT=mask)


@torch.no_grad()
def _score(module: Guided, heldout: Pictures, seed: int) -> dict[str, Any]:
    generator = random.Random(seed)
    texts = [generator.choice(scene.captions()) for scene in heldout.scenes]
    features, owner = heldout.features, torch.arange(len(texts))
    images_BE, texts_BE = module.embed_images(features)[:, 0], module.embed_texts(texts)
    found = retrieve(images_BE.unsqueeze(1), texts_BE, owner).metrics()
    right, wrong, near, far = module.match_margin(features, texts), [], (images_BE * texts_BE).sum(1), []
    for attribute in ATTRIBUTES:
        others = [generator.choice(neighbours(scene, generator)[attribute].captions()) for scene in heldout.scenes]
        wrong.append(module.match_margin(features, others))
        far.append((images_BE * module.embed_texts(others)).sum(1))
    return {
        "tokens": [s.left for s in module.streams.image.schedule()] or [GRID * GRID],
        "heldout_scenes": len(texts),
        "tr_at_1": round(found["tr_at_1"], 4),
        "ir_at_1": round(found["ir_at_1"], 4),
        "r1_chance": round(found["ir_at_1_chance"], 4),
        "itm_auc": round(auc(right, torch.cat(wrong)), 4),
        "itc_auc": round(auc(near, torch.cat(far)), 4),
    }


def _show_quality(rows: list[dict[str, Any]]) -> None:
    columns = (
        "keep rate", "tokens", "image -> text R@1", "text -> image R@1", "chance", "AUC by contrast",
        "by matching, guided", "by matching, unguided",
    )  # fmt: skip
    shown = [
        (
            f"{row['keep_rate']}", " ".join(map(str, row["tokens"])), f"{row['tr_at_1']:.3f}", f"{row['ir_at_1']:.3f}",
            f"{row['r1_chance']:.3f}", f"{row['itc_auc']:.3f}", f"{row['itm_auc']:.3f}",
            f"{row['unguided_itm_auc']:.3f}" if "unguided_itm_auc" in row else "",
        )
        for row in rows
    ]  # fmt: skip
    table("Drawn scenes, combinations never seen", columns, shown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="images of a timed pass")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=400, help="of each training of the second table; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
