"""One way to show how far something is: a bar on a terminal, a line every ten seconds in a log, nothing on request.

All of it goes to standard error, so that standard output stays free for results. ``ISTHMUS_PROGRESS=0`` silences it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_S = 10.0
_PAINT_EVERY_S = 0.1


class Tracker:
    """Counts what is done and knows the rate and the time left. Safe to use from several threads.

    Args:
        label: what is going on.
        total: how many units there are, or None when unknown.
        unit: what is counted, in the plural.
        paint: called after every change with the tracker and whether it is over.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "samples",
        paint: Callable[[Tracker, bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.fields: dict[str, Any] = {}
        self._paint, self._clock = paint, clock
        self._started = clock()
        self._lock = threading.RLock()

    def advance(self, n: int = 1) -> None:
        """``n`` more units are done."""
        with self._lock:
            self.done += n
            self._show(False)

    def update(self, total: int | None = None, **fields: Any) -> None:
        """A total that has become known, and values to show beside the bar (``loss=2.31``)."""
        with self._lock:
            self.total = self.total if total is None else total
            self.fields |= fields
            self._show(False)

    def finish(self) -> None:
        """Nothing more will come; called by :func:`progress`."""
        with self._lock:
            self._show(True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._started

    @property
    def rate(self) -> float | None:
        """Units per second since the start; None before anything is done."""
        return self.done / self.seconds if self.done and self.seconds > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at that rate; None where the total or the rate is unknown."""
        if self.total is None or self.rate is None:
            return None
        return max(self.total - self.done, 0) / self.rate

    def facts(self) -> str:
        """``1200/5000 samples, 310/s, 12 s left, loss 2.31``."""
        parts = [f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"]
        if self.rate is not None:
            parts.append(f"{self.rate:.3g}/s" if self.rate < 1000 else f"{self.rate:.0f}/s")
        if self.remaining_s:
            parts.append(f"{duration(self.remaining_s)} left")
        parts += [f"{name} {_short(value)}" for name, value in self.fields.items()]
        return ", ".join(parts)

    def _show(self, over: bool) -> None:
        if self._paint is not None:
            self._paint(self, over)


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "samples") -> Iterator[Tracker]:
    """Shows the progress of the block; see :class:`Tracker` for what to call inside.

    A terminal gets a bar, anything else a plain line at most every ten seconds and one at the end.
    """
    if os.environ.get("ISTHMUS_PROGRESS") == "0":
        yield Tracker(label, total, unit)
        return
    if not sys.stderr.isatty():
        tracker = Tracker(label, total, unit, paint=_Lines())
        yield tracker
        tracker.finish()
        return
    bar = _Bar(label, total)
    try:
        tracker = Tracker(label, total, unit, paint=bar)
        yield tracker
        tracker.finish()
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Lines:
    """A line at most every ten seconds, and the last one."""

    def __init__(self, write: Callable[[str], Any] | None = None) -> None:
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._last = 0.0

    def __call__(self, tracker: Tracker, over: bool) -> None:
        if over:
            self._write(f"{tracker.label}: {tracker.facts()}, done in {duration(tracker.seconds)}")
        elif tracker.seconds - self._last >= LINE_EVERY_S:
            self._last = tracker.seconds
            self._write(f"{tracker.label}: {tracker.facts()}")


class _Bar:
    """One row of the bars that are on the screen; the first opens the display, the last closes it."""

    _lock = threading.Lock()
    _display: Progress | None = None
    _open = 0

    def __init__(self, label: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        with _Bar._lock:
            if _Bar._display is None:
                columns = (
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(24),
                    TextColumn("{task.fields[facts]}"),
                )
                _Bar._display = Progress(*columns, console=Console(stderr=True, highlight=False))
                _Bar._display.start()
            _Bar._open += 1
            self._task = _Bar._display.add_task(label, total=total, facts="")
        self._painted = 0.0

    def __call__(self, tracker: Tracker, over: bool) -> None:
        if _Bar._display is None or (not over and tracker.seconds - self._painted < _PAINT_EVERY_S):
            return
        self._painted = tracker.seconds
        total = tracker.total if not over or tracker.total is not None else tracker.done
        _Bar._display.update(self._task, total=total, completed=tracker.done, facts=tracker.facts())

    def close(self) -> None:
        with _Bar._lock:
            _Bar._open -= 1
            if _Bar._open == 0 and _Bar._display is not None:
                _Bar._display.stop()
                _Bar._display = None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
