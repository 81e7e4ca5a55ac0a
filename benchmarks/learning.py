"""The learning proof: BLIP-2's two stages learn to compose, and controls that must fail do fail.

Scenes of coloured shapes are drawn on the fly: a count, a colour, a shape and a place make 960 combinations, a fifth of
which no part ever sees in training. A small convolutional network learns the attributes of training scenes and is
frozen; a small language model learns the sentences and is frozen; between them the library's own stage 1 and stage 2
train a Q-Former of under three million parameters, on one process.

    python benchmarks/learning.py --seed 0 --json learning.json

Figures are of held-out combinations. Controls: pairs shuffled before training; stage 2 without stage 1; losses with
the images permuted.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import _passive  # noqa: F401 - before torch
import torch
import torch.nn.functional as F
from _steps import report
from PIL import Image
from torch import Tensor, nn

from isthmus.config import QFormerConfig, VisionConfig
from isthmus.contracts import Batch, LocalComm, LossTerms, StageModule
from isthmus.data.sources.compositions import (
    ATTRIBUTES,
    QUESTIONS,
    Split,
    answers,
    neighbours,
    retrieval_ceiling,
    split_scenes,
    values,
)
from isthmus.data.sources.scenes import Scene, render
from isthmus.evaluation.captioning import derangement, score_captions
from isthmus.evaluation.retrieval import retrieve
from isthmus.methods.batching import tokenise
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.methods.parts import seeded
from isthmus.models.language import build_language
from isthmus.testing.words import trained_lm, word_tokenizer

SIDE, GRID, WIDTH = 64, 8, 64  # pixels; tokens of the encoder along one side; their width
SHAPE = QFormerConfig(
    layers=4, width=128, heads=4, feed_forward=512, queries=8, cross_every=2, dropout=0.0, embed=64, init=None
)
BATCH, HELDOUT, DRAWINGS = 64, 0.2, 8


def main() -> None:
    """Train, score, print, and write the figures where ``--json`` says."""
    options = _options()
    figures = prove(options.seed, options.scale, say=lambda text: print(text, flush=True))
    report(figures, options.json)


def prove(seed: int = 0, scale: float = 1.0, say: Callable[[str], None] = lambda _: None) -> dict[str, object]:
    """The whole proof.

    Args:
        seed: of the split, the drawings, all weights and draws.
        scale: of all numbers of steps.
        say: told what is going on.

    Returns:
        flat figures; shares and recalls are fractions of 1.
    """
    begun, worked = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    steps = {name: max(2, round(scale * n)) for name, n in STEPS.items()}
    split = split_scenes(HELDOUT, seed)
    train, heldout, accuracy = _see(split, steps["encoder"], seed)
    figures: dict[str, object] = {"encoder_attribute_accuracy": accuracy}
    say(f"[{time.process_time() - worked:4.0f} s] encoder names {accuracy:.3f} of held-out attributes")

    stage1 = _stage1(split, seed)
    _train(stage1, lambda step: _pairs(stage1, train, step, seed), steps["stage1"], 1e-3, say)
    figures |= {"trained_parameters": _trainable(stage1), **_score_stage1(stage1, heldout, seed)}
    say(f"[{time.process_time() - worked:4.0f} s] stage 1: {_short(figures)}")

    control = _stage1(split, seed)
    mixed = _shuffled(train, seed)
    _train(control, lambda step: _pairs(control, mixed, step, seed), steps["shuffled"], 1e-3, say)
    figures |= {f"shuffled_{k}": v for k, v in _score_stage1(control, heldout, seed).items() if k in SHUFFLED}
    say(f"[{time.process_time() - worked:4.0f} s] shuffled pairs")

    with tempfile.TemporaryDirectory() as folder:
        documents = [_sentences(scene) for scene in split.train]
        config, lm_loss = trained_lm(folder, documents, steps=steps["language"], width=128, seed=seed)
        figures["language_model_loss"] = round(lm_loss, 4)
        say(f"[{time.process_time() - worked:4.0f} s] language model: {lm_loss:.3f} nats a token")
        for prefix, start in (("", stage1), ("no_stage1_", None)):
            stage2 = _stage2(config, start, seed)
            _train(stage2, lambda step, m=stage2: _asked(m, train, step, seed), steps["stage2"], 1e-3, say)
            figures |= {f"{prefix}{k}": v for k, v in _score_stage2(stage2, split, heldout, seed).items()}
            say(f"[{time.process_time() - worked:4.0f} s] stage 2 {'from stage 1' if start else 'without stage 1'}")
    figures["cpu_seconds"] = round(time.process_time() - worked, 1)
    figures["seconds"] = round(time.perf_counter() - begun, 1)
    return figures


STEPS = {"encoder": 220, "stage1": 700, "shuffled": 250, "language": 700, "stage2": 400}
SHUFFLED = ("tr_at_1", "ir_at_1", "itm_auc")


# ---------------------------------------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class Pictures:
    """Drawn scenes as frozen features [n, N, D]; ``rows`` gives each scene's drawings."""

    scenes: tuple[Scene, ...]
    features: Tensor
    of_scene: tuple[tuple[int, ...], ...]
    texts: tuple[Scene, ...]  # what the pictures are said to show; the scenes themselves but in a control


class Encoder(nn.Module):
    """Five convolutions; a grid of tokens, each of which sees half of the picture, beside a code of its place.

    It learns to name what is there from the strongest tokens, wherever they are, and the place from all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, strides = [3, 32, WIDTH, WIDTH, WIDTH, WIDTH], [1, 2, 2, 2, 1]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=stride, padding=1)
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.heads = nn.ModuleDict(
            {a: nn.Linear(WIDTH * (GRID * GRID if a == "place" else 1), len(values(a))) for a in ATTRIBUTES}
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Feature map [B, WIDTH, GRID, GRID]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            pixels_BCHW = F.relu(norm(layer(pixels_BCHW)))
        return pixels_BCHW

    def names(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits of each attribute's values."""
        seen = self(pixels_BCHW)
        return {a: head(seen.flatten(1) if a == "place" else seen.amax((2, 3))) for a, head in self.heads.items()}

    def tokens(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, GRID x GRID, WIDTH + 2 GRID]: the map's places, each with its row and column."""
        tokens_BND = self(pixels_BCHW).flatten(2).transpose(1, 2)
        eye = torch.eye(GRID)
        row, column = eye.repeat_interleave(GRID, 0), eye.repeat(GRID, 1)
        return torch.cat([tokens_BND, torch.cat([row, column], 1).expand(len(tokens_BND), -1, -1)], 2)


def _see(split: Split, steps: int, seed: int) -> tuple[Pictures, Pictures, float]:
    """Trains the encoder on training scenes; then what it, frozen, makes of training and held-out scenes, and the share
    of held-out attributes that its own heads name."""
    scenes = {"train": split.train, "heldout": split.heldout}
    copies = {"train": DRAWINGS, "heldout": 1}
    pixels = {name: _draw(scenes[name], copies[name], 2 * seed + n) for n, name in enumerate(scenes)}
    targets = {name: _targets(found) for name, found in scenes.items()}
    encoder = Encoder().train()
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        rows = torch.randint(len(pixels["train"]), (BATCH,))
        seen = encoder.names(pixels["train"][rows])
        wanted = {a: t.repeat_interleave(DRAWINGS)[rows] for a, t in targets["train"].items()}
        loss = sum((F.cross_entropy(seen[a], wanted[a]) for a in ATTRIBUTES), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.eval().requires_grad_(False)
    with torch.no_grad():
        tokens = {
            name: torch.cat([encoder.tokens(part) for part in found.split(256)]) for name, found in pixels.items()
        }
        seen = encoder.names(pixels["heldout"])
        right = [(seen[a].argmax(1) == targets["heldout"][a]).float().mean() for a in ATTRIBUTES]
    found = []
    for name, told in scenes.items():
        of_scene = tuple(tuple(range(i * copies[name], (i + 1) * copies[name])) for i in range(len(told)))
        found.append(Pictures(told, tokens[name], of_scene, told))
    return found[0], found[1], round(float(torch.stack(right).mean()), 4)


def _draw(scenes: Sequence[Scene], copies: int, seed: int) -> Tensor:
    generator = random.Random(seed)
    drawn = []
    for scene in scenes:
        for _ in range(copies):
            image = Image.open(io.BytesIO(render(scene, generator.getrandbits(48)))).convert("RGB").resize((SIDE, SIDE))
            drawn.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def _targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    return {a: torch.tensor([values(a).index(answers(scene)[a]) for scene in scenes]) for a in ATTRIBUTES}


# --------------------------------------------------------------------------------------------------- training


def _train(
    module: StageModule, batch: Callable[[int], Batch], steps: int, lr: float, say: Callable[[str], None]
) -> None:
    """A plain loop: AdamW, warm-up and cosine, clipping."""
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        terms: LossTerms = module(batch(step))
        optimizer.zero_grad()
        terms.total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            parts = {name: round(float(value), 3) for name, value in (terms.parts | terms.metrics).items()}
            say(f"       step {step + 1}: {parts}")
    module.eval()


def _stage1(split: Split, seed: int) -> Blip2Stage1:
    tokenizer = word_tokenizer([text for scene in split.train for text in scene.captions()])
    with seeded(seed):
        return Blip2Stage1(Blip2Stage1Config(qformer=SHAPE), None, WIDTH + 2 * GRID, tokenizer, LocalComm(), seed)


def _stage2(language: Any, start: Blip2Stage1 | None, seed: int) -> Blip2Stage2:
    config = Blip2Stage2Config(vision=VisionConfig(), qformer=SHAPE, language=language, projection_init="embedding")
    with seeded(seed):
        module = Blip2Stage2(config, None, WIDTH + 2 * GRID, build_language(language), LocalComm())
    if start is not None:
        module.load_stage1({name: p.detach() for name, p in start.named_parameters()})
    return module


def _chosen(pictures: Pictures, step: int, seed: int) -> tuple[list[int], list[Scene], Tensor, random.Random]:
    """Scenes that all differ, so that no pair is a false negative; one drawing of each, and a generator for texts.

    Half of them differ from another one in a single attribute: among scenes drawn at random colour, shape and place
    nearly always tell any two apart, and nothing asks for the count.
    """
    generator = random.Random(seed * 1_000_003 + step)
    number = {scene: i for i, scene in enumerate(pictures.scenes)}
    scenes: dict[int, None] = {}  # an ordered set
    while len(scenes) < BATCH:
        one = generator.choice(pictures.scenes)
        other = neighbours(one, generator)[generator.choice(ATTRIBUTES)]
        scenes |= {number[scene]: None for scene in (one, other) if scene in number}
    chosen = list(scenes)[:BATCH]
    rows = [generator.choice(pictures.of_scene[i]) for i in chosen]
    return rows, [pictures.texts[i] for i in chosen], pictures.features[rows], generator


def _pairs(module: Blip2Stage1, pictures: Pictures, step: int, seed: int) -> Batch:
    rows, scenes, features, generator = _chosen(pictures, step, seed)
    ids, mask = tokenise(module.tokenizer, [generator.choice(scene.captions()) for scene in scenes], 32)
    return _batch(rows, features, step, ids_BT=ids, mask_BT=mask)


def _asked(module: Blip2Stage2, pictures: Pictures, step: int, seed: int) -> Batch:
    """Half captions, half questions with their answers; a question takes no loss."""
    rows, scenes, features, generator = _chosen(pictures, step, seed)
    told = []
    for scene in scenes:
        attribute = generator.choice(ATTRIBUTES)
        question = generator.random() < 0.5
        told.append(
            (QUESTIONS[attribute], answers(scene)[attribute]) if question else ("", generator.choice(scene.captions()))
        )
    return _batch(rows, features, step, **_labelled(module, told))


def _labelled(module: Blip2Stage2, told: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    single = [module.language.caption_tokens([text], prompt) for prompt, text in told]
    longest = max(ids.shape[1] for ids, _, _ in single)
    fills = (module.language.pad_id, 0, -100)
    return {
        name: torch.cat([F.pad(row[part], (0, longest - row[part].shape[1]), value=fills[part]) for row in single])
        for part, name in enumerate(("ids_BT", "mask_BT", "labels_BT"))
    }


def _batch(rows: Sequence[int], features: Tensor, step: int, **members: Tensor) -> Batch:
    valid = torch.ones(len(rows), dtype=torch.bool)
    return Batch(torch.tensor(rows), valid, step=step, features_BND=features, **members)


def _shuffled(pictures: Pictures, seed: int) -> Pictures:
    """Each scene told as another, always the same one."""
    order = derangement(len(pictures.scenes), seed)
    return Pictures(pictures.scenes, pictures.features, pictures.of_scene, tuple(pictures.scenes[i] for i in order))


def _sentences(scene: Scene) -> list[str]:
    """What the language model reads of a scene: its captions, and each question with its answer."""
    asked = [f"{QUESTIONS[a]} {answer}" for a, answer in answers(scene).items()]
    return [*scene.captions(), *asked]


# ---------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def _score_stage1(module: Blip2Stage1, heldout: Pictures, seed: int) -> dict[str, float]:
    generator = random.Random(seed)
    texts = [generator.choice(scene.captions()) for scene in heldout.scenes]
    features, owner = heldout.features, torch.arange(len(texts))
    found = retrieve(module.embed_images(features), module.embed_texts(texts), owner).metrics()
    right, wrong = module.match(features, texts), []
    for attribute in ATTRIBUTES:
        others = [generator.choice(neighbours(scene, generator)[attribute].captions()) for scene in heldout.scenes]
        wrong.append(module.match(features, others))
    generated = module.generate(features, max_new_tokens=24)
    itg, permuted = (_loss(module, _told(module, heldout, f, seed)).parts["itg"] for f in _and_permuted(features, seed))
    figures = {
        "heldout_scenes": float(len(texts)),
        "tr_at_1": found["tr_at_1"],
        "ir_at_1": found["ir_at_1"],
        "tr_at_5": found["tr_at_5"],
        "ir_at_5": found["ir_at_5"],
        "r1_chance": found["ir_at_1_chance"],
        "r1_ceiling": retrieval_ceiling(texts, heldout.scenes),
        "itm_auc": auc(right, torch.cat(wrong)),
        **{f"itm_auc_{a}": auc(right, scores) for a, scores in zip(ATTRIBUTES, wrong, strict=True)},
        "stage1_cider": _cider(generated, heldout.scenes),
        "itg_loss": float(itg),
        "itg_loss_permuted_images": float(permuted),
    }
    return {name: round(value, 4) for name, value in figures.items()}


@torch.no_grad()
def _score_stage2(module: Blip2Stage2, split: Split, heldout: Pictures, seed: int) -> dict[str, float]:
    features, scenes = heldout.features, heldout.scenes
    captions = module.generate(features, max_new_tokens=24)
    right = {}
    for attribute, question in QUESTIONS.items():
        given = module.generate(features, prompt=question, max_new_tokens=8)
        right[attribute] = sum(a == answers(s)[attribute] for a, s in zip(given, scenes, strict=True)) / len(scenes)
    told = [("", random.Random(seed + i).choice(scene.captions())) for i, scene in enumerate(scenes)]
    lm, permuted = (
        _loss(module, _batch(range(len(scenes)), f, 0, **_labelled(module, told))).parts["lm"]
        for f in _and_permuted(features, seed)
    )
    figures = {
        "cider": _cider(captions, scenes),
        "cider_ceiling": _cider([scene.captions()[0] for scene in scenes], scenes),
        "caption_exact": sum(c in s.captions() for c, s in zip(captions, scenes, strict=True)) / len(scenes),
        "vqa": sum(right.values()) / len(right),
        "vqa_prior": _prior(split),
        **{f"vqa_{a}": share for a, share in right.items()},
        "lm_loss": float(lm),
        "lm_loss_permuted_images": float(permuted),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a right pair scores above a wrong one; a tie counts half."""
    above = (right.unsqueeze(1) > wrong).double() + 0.5 * (right.unsqueeze(1) == wrong).double()
    return float(above.mean())


def _cider(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """CIDEr-D of held-out scenes on its natural scale, where 10 is a caption that equals every reference."""
    given = dict(enumerate(captions))
    return score_captions(given, {i: scene.captions() for i, scene in enumerate(scenes)}).metrics["cider"]


def _prior(split: Split) -> float:
    """Accuracy of always giving the most frequent training answer to each question."""
    shares = []
    for attribute in ATTRIBUTES:
        seen = [answers(scene)[attribute] for scene in split.train]
        best = max(set(seen), key=seen.count)
        shares.append(sum(answers(scene)[attribute] == best for scene in split.heldout) / len(split.heldout))
    return sum(shares) / len(shares)


def _told(module: Blip2Stage1, pictures: Pictures, features: Tensor, seed: int) -> Batch:
    texts = [random.Random(seed + i).choice(scene.captions()) for i, scene in enumerate(pictures.scenes)]
    ids, mask = tokenise(module.tokenizer, texts, 32)
    return _batch(range(len(texts)), features, 0, ids_BT=ids, mask_BT=mask)


def _and_permuted(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return features, features[derangement(len(features), seed)]


def _loss(module: StageModule, batch: Batch) -> LossTerms:
    terms: LossTerms = module(batch)
    return terms


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _short(figures: dict[str, object]) -> str:
    names = ("tr_at_1", "ir_at_1", "r1_ceiling", "itm_auc", "stage1_cider", "itg_loss", "itg_loss_permuted_images")
    return ", ".join(f"{name} {figures[name]}" for name in names)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of steps, for a quick look")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
