"""Do frozen encoders that see the same things alike (CKA) let themselves be joined by projectors, on real data?

Twelve pairs of frozen encoders: EfficientNet-Lite0, 1, 2 and a random network; MiniLM, SmolLM2's mean state and a
random BERT. For each pair: CKA without bias on the training pairs, beside permuted pairs; then projectors trained from
pooled features for a fixed number of steps, and held-out retrieval with 95 % intervals, beside chance and the same
training on shuffled pairs; and zero-shot classification of CIFAR-10, of which no picture was trained on. At the end the
rank correlation of CKA and retrieval.

    python benchmarks/alignment.py --data data/demo --json alignment.json

The pictures are those of `isthmus data fetch all` (emoji, stamps, clip art), 96 pixels wide here to save time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import _passive  # noqa: F401 - before torch
import numpy as np
import torch
from _alignment_data import CIFAR_CLASSES, Pictures, TextTable, caption_vectors, pictures, text_table, texts
from _steps import report, table
from scipy.stats import spearmanr

from isthmus.alignment.cka import Covariance, Similarity, similarity
from isthmus.config import ClassificationConfig, TextConfig, VisionConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.data.transforms import clean_caption
from isthmus.evaluation.captioning import derangement
from isthmus.evaluation.classification import class_ranks, class_vectors, classification_intervals, prompts
from isthmus.evaluation.retrieval import retrieve
from isthmus.methods.parts import seeded
from isthmus.methods.projector import Projector, ProjectorConfig

GLOBAL, LR = 256, 1e-3
CONFIG = ProjectorConfig(
    vision=VisionConfig(), text=TextConfig(), embed=256, pool="pool-then-project", dropout=0.3, label_smoothing=0.1
)


def main() -> None:
    """Features, CKA, training, figures."""
    options, started = _options(), time.perf_counter()
    if not Path(options.data, "train", "manifest.json").exists():
        print(f"No pictures in {options.data}: run `isthmus data fetch all` and index both of its folders.")
        return
    cache = Path(options.cache)
    cache.mkdir(parents=True, exist_ok=True)
    train, heldout, cifar = (
        pictures(name, data, limit, cache)
        for name, data, limit in (
            ("train", f"{options.data}/train", options.train), ("heldout", f"{options.data}/heldout", 0),
            ("cifar10", "cifar10", options.cifar),
        )
    )  # fmt: skip
    asked = [clean_caption(text) for text in prompts(CIFAR_CLASSES, ClassificationConfig().templates)]
    known = sorted({*train.said, *heldout.said, *asked})
    tables = {name: text_table(name, config, known, cache) for name, config in texts(cache).items()}
    featured = time.perf_counter() - started
    pairs = []
    for vision in train.vectors:
        kernel = Covariance(train.vectors[vision].numpy())
        for name, states in tables.items():
            alike = similarity(kernel, Covariance(caption_vectors(states, train.said)), permutations=5)
            pairs.append({"vision": vision, "text": name, **_alike(alike)})
            for which in ("", "shuffled_"):
                module = trained(train, vision, states, options.steps, shuffled=bool(which))
                pairs[-1] |= {f"{which}{n}": v for n, v in figures(module, heldout, vision).items()}
                if not which:
                    pairs[-1] |= zero_shot(module, cifar, vision, asked)
            print(f"  {vision} with {name}: CKA {pairs[-1]['cka']:.3f}, R@5 {pairs[-1]['r_at_5']:.3f}", flush=True)
    _show(pairs)
    best = max(pairs, key=lambda row: row["cka"])
    rank = {n: spearmanr([p["cka"] for p in pairs], [p[n] for p in pairs]) for n in ("r_at_5", "top_1")}
    found: dict[str, object] = {
        "pairs_trained": len(pairs), "training_pairs": len(train.said), "heldout_pairs": len(heldout.said),
        "steps": options.steps, "global_batch": GLOBAL, "r_at_5_chance": 5 / len(heldout.said),
        "spearman_cka_retrieval": round(float(rank["r_at_5"].statistic), 4),
        "spearman_cka_retrieval_p": float(f"{rank['r_at_5'].pvalue:.2g}"),
        "spearman_cka_zero_shot": round(float(rank["top_1"].statistic), 4),
        "best_by_cka": f"{best['vision']} with {best['text']}",
        "rank_of_best_by_cka": 1 + sum(p["r_at_5"] > best["r_at_5"] for p in pairs),
        **{f"best_{n}": v for n, v in best.items() if n not in ("vision", "text")},
        "most_shuffled_r_at_5": max(p["shuffled_r_at_5"] for p in pairs),
        "cifar10_images": len(cifar.said), "top_1_chance": 1 / len(CIFAR_CLASSES),
        "seconds_features": round(featured, 1), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    report(found, None)
    if options.json:
        Path(options.json).write_text(json.dumps({**found, "pairs": pairs}, indent=1) + "\n", encoding="utf-8")


def _alike(found: Similarity) -> dict[str, float]:
    """CKA as selection prints it."""
    values = {"cka": found.debiased, "cka_permuted": found.debiased_permuted, "cka_biased": found.biased}
    values |= {"cka_biased_permuted": found.biased_permuted}
    return {name: round(value, 4) for name, value in values.items()} | {"cka_n": found.samples}


def trained(train: Pictures, vision: str, states: TextTable, steps: int, *, shuffled: bool) -> Projector:
    """Projectors after so many steps on the training pairs, or on the same pictures with one another's captions."""
    images, said = train.vectors[vision].unsqueeze(1), list(train.said)
    if shuffled:
        said = [said[i] for i in derangement(len(said), 0)]
    with seeded(0):
        module = Projector(CONFIG, None, images.shape[2], states, LocalComm()).train()  # type: ignore[arg-type]
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.15)
    random = np.random.default_rng(0)
    for step in range(steps):
        rows = random.choice(len(said), GLOBAL, replace=False)
        batch = Batch(
            torch.from_numpy(rows), torch.ones(GLOBAL, dtype=torch.bool), step=step, features_BND=images[rows],
            texts=tuple(said[i] for i in rows.tolist()),
        )  # fmt: skip
        optimizer.zero_grad()
        module(batch).total.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def figures(module: Projector, heldout: Pictures, vision: str) -> dict[str, object]:
    """Held-out retrieval, R@K both ways, with intervals; ``r_at_5`` is the mean of both."""
    images = module.embed_images(heldout.vectors[vision].unsqueeze(1))
    found = retrieve(images, module.embed_texts(heldout.said), torch.arange(len(heldout.said)))
    metrics = found.metrics()
    kept = {name: round(metrics[name], 4) for k in (1, 5, 10) for name in (f"tr_at_{k}", f"ir_at_{k}")}
    return {**kept, **found.intervals(), "r_at_5": round((metrics["tr_at_5"] + metrics["ir_at_5"]) / 2, 4)}


def zero_shot(module: Projector, cifar: Pictures, vision: str, asked: list[str]) -> dict[str, object]:
    """Top-1 among CIFAR-10's ten classes, by an ensemble of prompts."""
    classes = class_vectors(module.embed_texts(asked), len(CIFAR_CLASSES))
    label = torch.tensor([CIFAR_CLASSES.index(name) for name in cifar.said])
    ranks, _ = class_ranks(module.embed_images(cifar.vectors[vision].unsqueeze(1)), classes, label)
    interval = classification_intervals(ranks, len(CIFAR_CLASSES))["top_1_ci95"]
    return {"top_1": round(float((ranks == 1).double().mean()), 4), "top_1_ci95": interval}


def _show(pairs: list[dict[str, object]]) -> None:
    def share(row: dict[str, object], name: str) -> str:
        low, high = row[f"{name}_ci95"]  # type: ignore[misc]
        return f"{100 * row[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"  # type: ignore[operator]

    rows = [
        [
            f"{row['vision']}, {row['text']}".replace("tf_efficientnet_", ""), f"{row['cka']:.3f}",
            f"{row['cka_permuted']:.3f}", share(row, "tr_at_1"), share(row, "tr_at_5"), share(row, "ir_at_5"),
            f"{100 * row['shuffled_tr_at_5']:.1f}", share(row, "top_1"),  # type: ignore[operator]
        ]
        for row in sorted(pairs, key=lambda row: -row["cka"])  # type: ignore[operator]
    ]  # fmt: skip
    columns = ["encoders", "CKA", "permuted", "TR@1 %", "TR@5 %", "IR@5 %", "shuffled TR@5", "CIFAR-10 top-1 %"]
    table("By CKA without bias; held-out figures with 95 % intervals", columns, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="data/demo", help="folder with train/ and heldout/ of `isthmus data fetch`")
    parser.add_argument("--cache", default="runs/alignment", help="folder that features are kept in")
    parser.add_argument("--train", type=int, default=3000, help="training pairs, evenly spaced over all; 0: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cifar", type=int, default=600, help="test images of CIFAR-10")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
