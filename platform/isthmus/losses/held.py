"""Learned scalars that have to stay within bounds: temperatures, log-variances."""

from __future__ import annotations

from torch import Tensor


def held(free: Tensor, low: float, high: float) -> Tensor:
    """``free`` in float32, held inside [low, high] without cutting its gradient.

    The training loop holds the parameter itself inside after every step (:meth:`isthmus.contracts.StageModule.bounds`);
    this is for one that comes from elsewhere, as from a parent with wider bounds, and for uses outside of the loop.
    """
    free = free.float()
    return free + (free.clamp(low, high) - free).detach()
