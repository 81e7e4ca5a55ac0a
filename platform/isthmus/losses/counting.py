"""Means over the global batch, and random numbers that do not depend on how the batch is split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.contracts import Comm

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


class GlobalMean:
    """Means over the rows that count on all ranks; one collective call when made, none when used.

    Args:
        counted_B: bool, the local rows that count.
        comm: the ranks' collectives.
    """

    def __init__(self, counted_B: Tensor, comm: Comm) -> None:
        self.counted_B = counted_B
        self.scale = comm.world_size / comm.sum(counted_B.sum().to(torch.float32)).clamp(min=1.0)

    def __call__(self, values_B: Tensor) -> Tensor:
        """Scalar whose average over ranks is the mean of ``values_B``: local sum x world size / global count.

        That is the scaling :class:`isthmus.contracts.LossTerms` asks for. Where nothing counts on any rank the result
        is 0, still attached to the graph.
        """
        return values_B.masked_fill(~self.counted_B, 0.0).sum() * self.scale


def uniform(seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """float64 numbers in [0, 1), one for each element of the broadcast ``counters``; a pure function of its arguments.

    A chain of splitmix64 finalisers (Steele, Lea, Flood 2014): no state, so a row draws the same number on any rank.
    """
    with np.errstate(over="ignore"):
        word = _mix(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64))
        for counter in counters:
            value = np.asarray(counter)
            word = _mix(word ^ (value.astype(np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: np.ndarray) -> np.ndarray:
    word = (word + np.uint64(0x9E3779B97F4A7C15)) & _MASK
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
