"""What is summed up between two logged rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.contracts import Batch


@dataclass
class Window:
    """Sums over the steps since the last logged row, of one worker.

    Attributes:
        started: when it began, by ``time.perf_counter``.
        steps, images, tokens: done and seen in it. waited_s: seconds that its batches were waited for.
    """

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    images: int = 0
    tokens: int = 0
    waited_s: float = 0.0
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def count(self, batch: Batch, waited_s: float) -> None:
        """Take in what a step read."""
        self.steps += 1
        self.images += int(batch.valid_B.sum())
        self.tokens += int(batch.mask_BT.sum()) if batch.mask_BT is not None else 0
        self.waited_s += waited_s

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step's values; a loss part that is not computed in every step is averaged over those it is in."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def seconds(self) -> float:
        """Since it began."""
        return max(time.perf_counter() - self.started, 1e-9)
