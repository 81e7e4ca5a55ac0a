"""Masked language modelling: which tokens are hidden, and the cross-entropy of guessing them (Devlin et al. 2019).

Shape letters: B local rows, T text tokens, V vocabulary, M width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contracts import Comm
from isthmus.losses.counting import uniform
from isthmus.losses.language import IGNORED

CHOICE, KIND, WORD = 11, 12, 13
"""Which draw of a token: whether it is asked for, what stands in its place, which random word."""


@dataclass(frozen=True)
class Masked:
    """Ids as the model reads them, and the targets (-100 where nothing is asked), int64 [B, T]."""

    ids_BT: Tensor
    labels_BT: Tensor


def mask_tokens(
    ids_BT: Tensor, words_BT: Tensor, mask_id: int, vocab: int, *, seed: int, step: int, first_row: int,
    share: float = 0.15,
) -> Masked:  # fmt: skip
    """Asks for ``share`` of the words; of those 80 % become the mask, 10 % a random word, 10 % stay.

    Every draw is a function of (seed, step, global row, place), so it is the same for any number of ranks.

    Args:
        ids_BT: int64.
        words_BT: bool; padding and special tokens are never asked for.
        mask_id: of ``[MASK]``.
        vocab: V, for random words.
        seed, step: of the run.
        first_row: this rank's first place in the global batch.
        share: of the words.
    """
    B, T = ids_BT.shape
    rows = np.arange(first_row, first_row + B)[:, None]
    draws = [torch.from_numpy(uniform(seed, step, rows, np.arange(T), which)) for which in (CHOICE, KIND, WORD)]
    chosen, kind, word = (draw.to(ids_BT.device) for draw in draws)
    asked_BT = words_BT & (chosen < share)
    random_BT = (word * vocab).long().clamp(max=vocab - 1)
    read_BT = torch.where(asked_BT & (kind < 0.8), mask_id, ids_BT)
    read_BT = torch.where(asked_BT & (kind >= 0.8) & (kind < 0.9), random_BT, read_BT)
    return Masked(read_BT, ids_BT.masked_fill(~asked_BT, IGNORED))


def masked_sum(hidden_BTM: Tensor, labels_BT: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Cross-entropy summed over what is asked; logits are made there alone."""
    asked = labels_BT != IGNORED
    if not bool(asked.any()):  # one row at no weight keeps the graph alike on all ranks
        return head(hidden_BTM[:1, 0]).float().sum() * 0.0
    return F.cross_entropy(head(hidden_BTM[asked]).float(), labels_BT[asked], reduction="sum")


def masked_count(labels_BT: Tensor, comm: Comm) -> Tensor:
    """What turns :func:`masked_sum` into a mean over all ranks' asked tokens when it is divided by it; never zero."""
    return (comm.sum((labels_BT != IGNORED).sum().to(torch.float32)) / comm.world_size).clamp(min=1e-6)
