"""Next-token cross-entropy: a sum over rows, the count that it is divided by, and a sum through a frozen output layer.

Shape letters: B local rows, T text tokens, V vocabulary, M width, K positions that carry a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from isthmus.contracts import Comm, Reference
from isthmus.losses.contrastive import smoothing_floor

IGNORED = -100
CHUNK_ELEMENTS = 2**24
"""Logits that :func:`frozen_head_loss` makes at once: 64 MB in float32, and a few times that to differentiate them."""


def next_token_sum(
    hidden_BTM: Tensor, labels_BT: Tensor, head: Callable[[Tensor], Tensor], *, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of position t's logits against label t + 1, summed over rows and tokens.

    Logits are made only where there is a target: the vocabulary is the widest axis of the model.

    Args:
        hidden_BTM: last hidden states.
        labels_BT: int64; -100 where no loss is taken. Unshifted: the shift happens here.
        head: hidden [K, M] -> logits [K, V].
        smoothing: label smoothing over the vocabulary.
    """
    targets_BT = labels_BT[:, 1:]
    counted = targets_BT != IGNORED
    hidden_KM, targets_K = hidden_BTM[:, :-1][counted], targets_BT[counted]
    if not len(targets_K):  # padding rows alone: one row at no weight keeps the graph alike on all ranks
        return head(hidden_BTM[:1, 0]).float().sum() * 0.0
    return F.cross_entropy(head(hidden_KM).float(), targets_K, label_smoothing=smoothing, reduction="sum")


def next_token_count(labels_BT: Tensor, comm: Comm, mean: Literal["global", "rank"] = "global") -> Tensor:
    """What turns :func:`next_token_sum` into a mean when it is divided by it, float32 scalar; never zero.

    Args:
        labels_BT: as there.
        comm: the ranks' collectives.
        mean: ``global`` counts the tokens of all ranks, so that any split gives one answer; ``rank`` this rank's own,
            as LAVIS does.
    """
    local = (labels_BT[:, 1:] != IGNORED).sum().to(torch.float32)
    count = comm.sum(local) / comm.world_size if mean == "global" else local
    return count.clamp(min=1e-6)


def frozen_head_loss(
    hidden_KM: Tensor, targets_K: Tensor, head: Callable[[Tensor], Tensor], vocab: int, *, rows: int | None = None
) -> Tensor:
    """Cross-entropy summed over rows, float32 scalar in nats, through an output layer that takes no gradient.

    Logits are made for some rows at a time and dropped again, so that [K, V] is never held. The gradient of the hidden
    states is made in the forward pass, while a chunk's logits are there: nothing is computed twice.

    Args:
        hidden_KM: last hidden states at the positions that carry a target.
        targets_K: int64.
        head: hidden [k, M] -> logits [k, V], row by row. Its parameters get no gradient, whatever they ask for.
        vocab: V.
        rows: of a chunk; by default as many as CHUNK_ELEMENTS allow.
    """
    rows = max(1, CHUNK_ELEMENTS // vocab) if rows is None else rows
    total: Tensor = _FrozenHeadLoss.apply(hidden_KM, targets_K, head, rows)
    return total


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_KM: Tensor, targets_K: Tensor, head: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = hidden_KM.new_zeros((), dtype=torch.float32)
        slopes = torch.empty_like(hidden_KM) if wanted else None
        for start in range(0, len(hidden_KM), rows):
            # Its graph is done with at once: under gradient checkpointing, whose hooks take away what is kept and make
            # it anew, the whole forward pass would run here once more.
            with torch.set_grad_enabled(wanted), saved_tensors_hooks(_same, _same):
                part = hidden_KM[start : start + rows].detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(part).float(), targets_K[start : start + rows], reduction="sum")
            if slopes is not None:
                torch.autograd.backward(loss, inputs=[part])  # autograd.grad ends in an error under a FLOP counter
                assert part.grad is not None
                slopes[start : start + rows] = part.grad
            total += loss.detach()
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        slopes = ctx.saved_tensors[0]
        return slopes * slope.to(slopes.dtype), None, None, None


def language_reference(vocab: int, smoothing: float = 0.0) -> Reference:
    """ln V for a model that knows nothing, and the floor that smoothing leaves."""
    return Reference(math.log(vocab), smoothing_floor(vocab, smoothing) if smoothing else 0.0)
