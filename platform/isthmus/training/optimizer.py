"""AdamW's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from isthmus.config import TrainConfig
from isthmus.errors import ConfigError, nearest


def adamw(module: nn.Module, train: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """torch's AdamW over the trained parameters of ``module``, in the groups of :func:`parameter_groups`.

    Raises:
        ConfigError: ``train.lr_scale`` names no trained parameter.
    """
    groups = parameter_groups(module, train.weight_decay, train.lr_scale)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=fused)


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of one weight decay and one ``scale`` of the learning rate each.

    One-dimensional parameters and names that end in ``.bias`` take no decay, the rule of BLIP-2's training code. A
    temperature has shape [1] here and falls under it, so it is never decayed (in that code it has no dimension at all
    and is). Queries and embeddings are decayed.

    Args:
        lr_scale: factor by the beginning of a parameter's name, in whole parts; the longest that fits counts.

    Raises:
        ConfigError: no trainable parameter's name begins so.
    """
    lr_scale = lr_scale or {}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for prefix in lr_scale:
        if not any(_begins(name, prefix) for name, _ in named):
            known = sorted({name.partition(".")[0] for name, _ in named})
            raise ConfigError(
                f"train.lr_scale names '{prefix}', and no trained parameter begins so.{nearest(prefix, known)}",
                f"Known here: {', '.join(known)}.",
            )
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        prefix = max((p for p in lr_scale if _begins(name, p)), key=len, default="")
        plain = parameter.ndim <= 1 or name.endswith(".bias")
        groups.setdefault((prefix, plain), []).append(parameter)
    return [
        {
            "name": f"{prefix}{'.' if prefix else ''}{'no_decay' if plain else 'decay'}",
            "params": parameters,
            "weight_decay": 0.0 if plain else weight_decay,
            "scale": lr_scale.get(prefix, 1.0),
        }
        for (prefix, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of optimizer step ``step`` (0-based): linear warm-up to ``lr``, then a cosine to ``min_lr``, per step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    span = max(train.steps - train.warmup_steps - 1, 1)
    share = min((step - train.warmup_steps) / span, 1.0)
    return train.min_lr + 0.5 * (train.lr - train.min_lr) * (1.0 + math.cos(math.pi * share))
