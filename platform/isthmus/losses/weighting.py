"""How several losses make one: by fixed weights, by learned uncertainty, or by how fast each of them falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.contracts import Comm
from isthmus.losses.held import held

Weighting = Literal["fixed", "uncertainty", "dwa"]
LIMIT = 5.0
"""Learned log-variances stay within [-LIMIT, LIMIT]: a loss that goes to zero would otherwise gain weight for ever."""


class Uncertainty(nn.Module):
    """Sum of e^-s / 2 x loss + s / 2 with a learned s for each loss (Kendall, Gal and Cipolla 2018)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The total, and each loss's weight, detached."""
        log_variance = held(self.log_variance, -LIMIT, LIMIT)
        weights = torch.exp(-log_variance) / 2
        total = (weights * torch.stack([loss.float() for loss in losses])).sum() + log_variance.sum() / 2
        return total, weights.detach()


class DynamicAverage:
    """K x softmax(r / T) with r = a loss's mean of the last epoch over that of the one before (DWA: Liu et al. 2019).

    All weights are 1 until two epochs are over. The means are of the global batch, so every rank has the same weights;
    they are part of what a checkpoint holds (:meth:`state`), since later weights depend on them.

    Args:
        count: K.
        temperature: T.
        period: optimizer steps that count as an epoch; None takes the data's own epochs.
    """

    def __init__(self, count: int, temperature: float, period: int | None = None) -> None:
        self.count, self.temperature, self.period = count, temperature, period
        self.epoch = -1
        self.sums = torch.zeros(count, dtype=torch.float64)
        self.steps = 0
        self.past: list[list[float]] = []

    def weights(self, step: int, epoch: int) -> list[float]:
        """Those of this step; closes the epoch before where it is over."""
        now = epoch if self.period is None else step // self.period
        if now != self.epoch:
            if self.steps:
                self.past = [*self.past[-1:], (self.sums / self.steps).tolist()]
            self.epoch, self.steps, self.sums = now, 0, torch.zeros_like(self.sums)
        if len(self.past) < 2:
            return [1.0] * self.count
        return dynamic_weights(self.past[0], self.past[1], self.temperature)

    def add(self, losses: Sequence[Tensor], comm: Comm) -> None:
        """Takes in a step's losses, scaled as in LossTerms. Collective."""
        stacked = torch.stack([loss.detach().float() for loss in losses])
        self.sums = self.sums.to(stacked.device) + (comm.sum(stacked) / comm.world_size).double()
        self.steps += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that later weights depend on; float64 on the CPU, so nothing is rounded."""
        past = [value for epoch in self.past for value in epoch]
        numbers = torch.tensor([self.epoch, self.steps, len(self.past), *past], dtype=torch.float64)
        return {"dwa": torch.cat([numbers, self.sums.cpu()])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where :meth:`state` was taken."""
        values = state["dwa"].double().tolist()
        self.epoch, self.steps, epochs = (int(value) for value in values[:3])
        K, rest = self.count, values[3:]
        self.past = [rest[i * K : (i + 1) * K] for i in range(epochs)]
        self.sums = torch.tensor(rest[epochs * K :], dtype=torch.float64)


def dynamic_weights(before: Sequence[float], last: Sequence[float], temperature: float) -> list[float]:
    """K x softmax(r / T) with r = last / before."""
    ratios = [new / max(old, 1e-12) / temperature for old, new in zip(before, last, strict=True)]
    powers = [math.exp(ratio - max(ratios)) for ratio in ratios]  # or a loss that was nothing would overflow
    return [len(powers) * power / sum(powers) for power in powers]
