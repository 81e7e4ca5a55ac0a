"""The Ray cluster that a run is in, and Ctrl-C while Ray Train is at work."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from isthmus.config import RunConfig


@contextlib.contextmanager
def ray_cluster(run: RunConfig) -> Iterator[None]:
    """A Ray cluster: the one this process is in, the one that RAY_ADDRESS names, or one of this machine's own."""
    # Ray reads these when its modules are first imported, and passes them on to the controller.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else one Python process per logical CPU starts at once, most of them for nothing.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    started = not ray.is_initialized()
    if started and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
    elif started:
        # As many logical CPUs as the workers need and some for reading data: with fewer they wait for one another.
        cpus = int(run.cluster.workers * run.cluster.cpus_per_worker) + 4
        ray.init(
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=bool(os.environ.get("ISTHMUS_RAY_LOGS")),
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        if started:
            ray.shutdown()


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
