"""Gradient checkpointing of a frozen transformers model.

transformers' own switch asks whether a layer is in training mode, which for a frozen model is never so: dropout would
wake with it. What matters is only whether a gradient is to pass through the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from isthmus.compat import ensure_torchvision

ensure_torchvision()
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402


def recompute_layers(model: nn.Module) -> int:
    """Has every layer of ``model`` keep its input alone for the backward pass, which runs the layer once more.

    Values and gradients stay what they are, mode and dropout too. Without gradients, as in generation, nothing changes.

    Args:
        model: of transformers, whose layers are marked as those that can be checkpointed.

    Returns:
        How many layers that are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # The instance's forward, not its call: hooks that fetch a sharded parameter stay outside and run once.
        layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]
    return len(layers)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not _any_gradient((*args, *kwargs.values())):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _any_gradient(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return True
        if isinstance(value, (tuple, list)) and _any_gradient(value):
            return True
        if isinstance(value, Mapping) and _any_gradient(value.values()):
            return True
    return False
