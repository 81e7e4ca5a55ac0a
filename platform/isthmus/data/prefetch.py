"""Iterating ahead of the consumer: one thread for a whole iterator, a pool for a function of many items."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")


def ahead(source: Iterable[T], depth: int) -> Iterator[T]:
    """The items of ``source``, up to ``depth`` of them made ready by a thread. Its errors are raised here; closing this
    iterator closes ``source``."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(source)
        try:
            for item in iterator:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))
        finally:
            close = getattr(iterator, "close", None)
            if close:
                close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(timeout=30)


def map_ahead(function: Callable[[A], T], items: Iterable[A], threads: int, depth: int) -> Iterator[T]:
    """``function`` of every item in order, ``threads`` at a time and at most ``threads + depth`` under way."""
    waiting: deque[Future[T]] = deque()
    rest = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        waiting.extend(pool.submit(function, item) for item in islice(rest, threads + depth))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
