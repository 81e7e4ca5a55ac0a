"""Small recipes of pairs that are heard, and rows to feed them. Shared by unit and distributed tests."""

from __future__ import annotations

import numpy as np
import torch

from isthmus.contracts import Sample, Stage
from isthmus.methods.co_optimise_config import (
    AttentionConfig,
    AudioConfig,
    CoOptimiseConfig,
    FramesConfig,
    MatchConfig,
)
from isthmus.testing.backbones import tiny_vision_config

SECONDS = 0.64  # 4 columns of patches


def heard_recipe(modality: str, **changes: object) -> CoOptimiseConfig:
    """A small configuration with every loss."""
    config = CoOptimiseConfig(
        modality=modality,  # type: ignore[arg-type]
        vision=tiny_vision_config(),
        embed=16,
        audio=AudioConfig(seconds=SECONDS, width=16, layers=1, heads=2),
        frames=FramesConfig(count=3, width=16, layers=1, heads=2),
        attention=AttentionConfig(kind="banded" if modality == "video-audio" else "full", heads=4, band=4),
        itm=MatchConfig(weight=0.5),
    )
    return config.model_copy(update=changes)


def heard_samples(stage: Stage, count: int, seed: int = 0) -> list[Sample]:
    """Random features and patches; sounds of different lengths."""
    random = np.random.default_rng(seed)
    tokens, patches = (stage.image_spec["tokens"], stage.image_spec["width"]), stage.transform.sound_shape
    return [
        Sample(
            i,
            f"s{i}",
            features_ND=random.standard_normal(tokens).astype(np.float32),
            audio_NF=random.standard_normal(patches).astype(np.float32),
            audio_mask_N=np.arange(patches[0]) < 8 * (1 + i % (patches[0] // 8)),
        )
        for i in range(count)
    ]


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Of the trained parameters, by name."""
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
