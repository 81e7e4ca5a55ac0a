"""Ctrl-C while Ray Train is at work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside the block ends as KeyboardInterrupt. Ray Train answers it by stopping the workers in order, and
    leaves with SystemExit or its own error; its handler would also stay in place afterwards."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    hit = threading.Event()
    original = signal.signal

    def install(number: int, handler: Any) -> Any:
        if number != signal.SIGINT or not callable(handler):
            return original(number, handler)

        def noted(signum: int, frame: Any) -> None:
            hit.set()
            handler(signum, frame)

        return original(number, noted)

    if main:
        signal.signal = install  # type: ignore[assignment]
    try:
        yield
    except BaseException:
        if hit.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal = original
            original(signal.SIGINT, before or signal.default_int_handler)
    if hit.is_set():
        raise KeyboardInterrupt
