"""One function over many items: as Ray tasks where that pays, else on threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from isthmus.progress import progress

A = TypeVar("A")
R = TypeVar("R")
_MANY = 64


def ray_is_up() -> bool:
    """Whether this process is part of a Ray cluster. Never imports Ray by itself."""
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def store_environment() -> dict[str, str]:
    """The variables that name stores and keys, to be laid over a worker's environment.

    They travel as an argument of the task, not in its runtime environment, which dashboards and logs show.
    """
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def map_ordered(
    function: Callable[[A], R], items: Sequence[A], *, label: str, unit: str = "shards", threads: int = 4
) -> Iterator[R]:
    """``function`` of every item, in the items' order, with a progress bar.

    Args:
        function: picklable; its errors are raised here.
        items: all of them, in order.
        label, unit: what the progress bar says.
        threads: parallel calls on this machine; on Ray four tasks per CPU of the cluster are kept under way.
    """
    runner = _on_ray if ray_is_up() and _worth_tasks(len(items)) else _on_threads
    with progress(label, total=len(items), unit=unit) as tracker:
        for result in runner(function, items, threads):
            tracker.advance()
            yield result


def _worth_tasks(items: int) -> bool:
    """Ray starts a process per task slot, seconds each: too much for a few items on the one machine there is."""
    import ray

    return items >= _MANY or sum(bool(node["Alive"]) for node in ray.nodes()) > 1


def _on_threads(function: Callable[[A], R], items: Sequence[A], threads: int) -> Iterator[R]:
    with ThreadPoolExecutor(max_workers=min(threads, len(items)) or 1) as pool:
        yield from pool.map(function, items)


def _on_ray(function: Callable[[A], R], items: Sequence[A], _threads: int) -> Iterator[R]:
    import ray

    environment = store_environment()

    def call(item: Any, variables: dict[str, str]) -> Any:
        os.environ.update(variables)
        return function(item)

    remote = ray.remote(call).options(num_cpus=0.5, max_retries=3)
    width = max(4, int(4 * ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    rest = iter(items)
    while True:
        while len(waiting) < width and (item := next(rest, _END)) is not _END:
            waiting.append(remote.remote(item, environment))
        if not waiting:
            return
        yield _result(ray, waiting.pop(0))


_END: Any = object()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
