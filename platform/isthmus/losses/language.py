"""Next-token cross-entropy, a mean over the tokens of the global batch.

Shape letters: B local rows, T text tokens, V vocabulary, M width, K positions that carry a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contracts import Comm, Reference
from isthmus.losses.contrastive import smoothing_floor

IGNORED = -100


def next_token_loss(
    hidden_BTM: Tensor,
    labels_BT: Tensor,
    head: Callable[[Tensor], Tensor],
    comm: Comm,
    *,
    smoothing: float = 0.0,
    mean: Literal["global", "rank"] = "global",
) -> Tensor:
    """Cross-entropy of position t's logits against label t + 1.

    Logits are made only where there is a target: the vocabulary is the widest axis of the model.

    Args:
        hidden_BTM: last hidden states.
        labels_BT: int64; -100 where no loss is taken. Unshifted: the shift happens here.
        head: hidden [K, M] -> logits [K, V].
        comm: the ranks' collectives.
        smoothing: label smoothing over the vocabulary.
        mean: ``global`` divides by the tokens of all ranks, so that any split gives one answer; ``rank`` by this
            rank's own, as LAVIS does.
    """
    targets_BT = labels_BT[:, 1:]
    counted = targets_BT != IGNORED
    local = counted.sum().to(torch.float32)
    count = comm.sum(local) / comm.world_size if mean == "global" else local
    hidden_KM, targets_K = hidden_BTM[:, :-1][counted], targets_BT[counted]
    if not len(targets_K):  # a rank of padding rows alone: one row at no weight keeps the graph alike on all ranks
        return head(hidden_BTM[:1, 0]).float().sum() * 0.0
    total = F.cross_entropy(head(hidden_KM).float(), targets_K, label_smoothing=smoothing, reduction="sum")
    return total / count.clamp(min=1e-6)


def language_reference(vocab: int, smoothing: float = 0.0) -> Reference:
    """ln V for a model that knows nothing, and the floor that smoothing leaves."""
    return Reference(math.log(vocab), smoothing_floor(vocab, smoothing) if smoothing else 0.0)
