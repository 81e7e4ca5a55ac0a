"""CPU seconds of this process and of all that it started, ended ones included."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil


@dataclass
class Cost:
    """What a piece of work took."""

    seconds: float = 0.0
    cpu_s: float = 0.0


class Meter:
    """Wall clock and CPU seconds of the block, in ``cost`` afterwards."""

    def __enter__(self) -> Meter:
        self.cost = Cost()
        self._cpu, self._started = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost = Cost(time.perf_counter() - self._started, cpu_seconds() - self._cpu)


def cpu_seconds() -> float:
    """User and system time of this process and its descendants. A process that has ended is counted by the one that
    waited for it."""
    total = 0.0
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it ended just now
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
