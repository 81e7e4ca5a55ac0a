"""Every method as a small recipe on small frozen parts, and pairs to feed it. Shared by unit and distributed tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from isthmus.config import CompressionConfig, FusionConfig, MethodConfig, QFormerConfig, RunConfig, TowerConfig
from isthmus.contracts import Batch, BuildContext, Comm, LocalComm, Question, Sample, Stage
from isthmus.methods import METHODS
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2Config
from isthmus.methods.co_optimise_config import AttentionConfig, CoOptimiseConfig, MatchConfig
from isthmus.methods.guided_config import GuidedConfig, RelationConfig
from isthmus.methods.guided_vqa import GuidedVqaConfig
from isthmus.methods.projector import ProjectorConfig
from isthmus.testing.backbones import tiny_bert, tiny_lm, tiny_vision_config

QFORMER = QFormerConfig(layers=2, width=32, heads=4, feed_forward=128, queries=4, dropout=0.0, embed=16)
GUIDED: dict[str, object] = {
    "image": TowerConfig(layers=2, width=24, heads=4, feed_forward=48, dropout=0.0),
    "compression": CompressionConfig(layers=(0, 1), keep=(0.5,)),
    "fusion": FusionConfig(text_layers=1, fusion_layers=1, width=32, heads=4, feed_forward=128, dropout=0.0, embed=16),
}
ANSWERS = ("cat", "dog", "two", "red", "yes")
CAPTIONS = (
    "a red cat",
    "two dogs running on the grass left of a house",
    "blue fish",
    "a woman with a hat sitting",
    "yellow banana",
    "a large tree and a small bird",
    "the moon",
    "a green square right of three balls",
)


def recipe(method: str, folder: Path, **changes: object) -> MethodConfig:
    """A small configuration of the method; its frozen parts are written into ``folder`` where they are not yet."""
    text, vision = tiny_bert(folder / "bert"), tiny_vision_config()
    configs: dict[str, MethodConfig] = {
        "blip2_stage1": Blip2Stage1Config(vision=vision, text=text, qformer=QFORMER),
        "blip2_stage2": Blip2Stage2Config(vision=vision, qformer=QFORMER, language=tiny_lm(folder / "lm")),
        "co_optimise": CoOptimiseConfig(
            vision=vision, text=text, embed=16, attention=AttentionConfig(heads=4), itm=MatchConfig(weight=0.5)
        ),
        "guided": GuidedConfig(vision=vision, text=text, relation=RelationConfig(width=16, steps=2), **GUIDED),
        "guided_vqa": GuidedVqaConfig(vision=vision, text=text, answers=ANSWERS, **GUIDED),
        "projector": ProjectorConfig(vision=vision, text=text, embed=16, dropout=0.0),
    }
    return configs[method].model_copy(update=changes)


def dropped(method: str) -> dict[str, object]:
    """Changes to a recipe that wake the method's dropout."""
    if method in ("co_optimise", "projector"):
        return {"dropout": 0.1}
    if method in ("guided", "guided_vqa"):
        image, fusion = TowerConfig.model_validate(GUIDED["image"]), FusionConfig.model_validate(GUIDED["fusion"])
        woken = {"dropout": 0.1}
        return {"image": image.model_copy(update=woken), "fusion": fusion.model_copy(update=woken)}
    return {"qformer": QFORMER.model_copy(update={"dropout": 0.1})}


def build(
    config: MethodConfig, comm: Comm | None = None, *, with_vision: bool = False, parent: str | None = None
) -> Stage:
    """The stage of a recipe."""
    context = BuildContext(comm=comm or LocalComm(), seed=3, with_vision=with_vision, parent=parent)
    return METHODS[config.name].build(config, context)


def moved(module: torch.nn.Module) -> None:
    """Trained weights far from the start, so that nothing about them is special."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)


def run_config(config: MethodConfig) -> RunConfig:
    """A run of the method, as an artefact stores it."""
    return RunConfig.model_validate(
        {"name": "test", "method": config, "data": {"train": "nowhere"}, "train": {"steps": 1, "seed": 3}}
    )


def samples(stage: Stage, count: int, seed: int = 0) -> list[Sample]:
    """Pairs with random image features and captions of very different lengths."""
    shape = (stage.image_spec["tokens"], stage.image_spec["width"])
    random = np.random.default_rng(seed)
    rows = [Sample(i, f"s{i}", features_ND=random.standard_normal(shape).astype(np.float32)) for i in range(count)]
    return [saying(row, CAPTIONS[i % len(CAPTIONS)]) for i, row in enumerate(rows)]


def saying(row: Sample, text: str) -> Sample:
    """The row with ``text`` as its caption, and as the question that it is asked."""
    answers = (ANSWERS[row.id % len(ANSWERS)],) * 7 + ("who knows",) * 2 + (ANSWERS[(row.id + 1) % len(ANSWERS)],)
    return replace(row, captions=(text,), questions=(Question(f"{row.id}#0", text, answers),))


def batch(stage: Stage, rows: Sequence[Sample], step: int = 0, padding: int = 0) -> Batch:
    """The rows' batch; the last ``padding`` of them are padding."""
    made = stage.collate(rows, 0, step)
    valid = torch.arange(len(rows)) < len(rows) - padding
    return replace(made, valid_B=made.valid_B & valid)
