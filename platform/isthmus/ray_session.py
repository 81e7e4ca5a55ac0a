"""Joins the Ray cluster that a command was started in, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.errors import IsthmusError

LOGS = "ISTHMUS_RAY_LOGS"
"""Set to anything, it shows what workers print; without it their logs are in Ray's session folder alone."""

AUTH = "RAY_AUTH_MODE"
MANY_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ATTEMPTS = 3
KNOCK_S = 10.0
LOGICAL_CPUS = 8
"""At least this many slots: two trainers, the readers and a controller together need more than a small machine has
cores, and with as many slots as cores they wait for one another for ever."""


@contextmanager
def ray_session(cpus: float = 0) -> Iterator[None]:
    """A Ray cluster for the block. One that was there before is left as it was.

    Inside a submitted job, or with ``RAY_ADDRESS`` set, the running cluster is joined. Otherwise one is started that
    listens on loopback alone, has no dashboard, and ends with the block.

    Args:
        cpus: logical CPUs that the block will ask for at once.

    Raises:
        IsthmusError: ``RAY_ADDRESS`` names a cluster that does not answer.
    """
    started = begin(cpus)
    try:
        yield
    finally:
        if started:
            end()


def begin(cpus: float = 0) -> bool:
    """What :func:`ray_session` does at its start: true where :func:`end` should follow, because Ray was not there."""
    joined = joins_cluster()
    prepare()
    import ray

    if ray.is_initialized():
        return False
    with _own_sigterm():
        if joined:
            _join()
        else:
            _start(max(LOGICAL_CPUS, os.cpu_count() or 1, int(cpus + 4)))
    return not _in_job()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's core puts a handler of its own over that of SIGTERM, which prints a trace and aborts the process: whatever
    the process wanted to close stays open. A handler that was there before is there again behind the block."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def end() -> None:
    """Leave the cluster, and stop it where this process started it."""
    import ray

    ray.shutdown()


def joins_cluster() -> bool:
    """Whether the environment names a cluster: ``RAY_ADDRESS``, which Ray also sets in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _in_job() -> bool:
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def _start(cpus: int) -> None:
    """A cluster of this machine's own. Ray gives up when one of its parts gets no CPU for a while, so it may take more
    than one attempt on a busy machine."""
    import ray
    from ray._private import ray_constants

    # Read from the environment when Ray is imported, which whoever calls this may have done before _prepare could act.
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(MANY_NODES) == "1"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=bool(os.environ.get(LOGS)),
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",  # Ray's own ports run code for whoever reaches them
            )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == ATTEMPTS:
                said = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
                raise IsthmusError(
                    f"Ray does not start on this machine: {said}.",
                    "Has it memory, disk and processes to spare? Ray's logs are in /tmp/ray/session_latest/logs.",
                ) from error


def _join() -> None:
    import ray

    refusal = IsthmusError(
        f"The Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} does not answer.",
        "Start it, correct the address, or unset RAY_ADDRESS to run on this machine.",
    )
    try:
        _knock(os.environ["RAY_ADDRESS"])
        ray.init(logging_level=logging.WARNING, log_to_driver=bool(os.environ.get(LOGS)))
    except (ConnectionError, TimeoutError, ValueError, OSError) as error:
        raise refusal from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens; Ray itself would go on trying for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), timeout=KNOCK_S).close()


def prepare() -> None:
    """Settings that Ray reads when it is first imported and hands to its children; what the user has set stays.

    Packages whose modules import Ray call this first: a process that imported Ray without them and starts a cluster
    with them would disagree with its own cluster about tokens.
    """
    late = "ray" in sys.modules
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # its 60 s count as a failure on a busy machine
        "RAY_prestart_worker_first_driver": "0",  # else one process per logical CPU starts, most for nothing
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not joins_cluster():
        # Ray takes 127.0.0.1 for "find my address" and then listens on every interface, for a cluster to come. This
        # switch, made for systems that only run single nodes, is what keeps all of its ports on loopback.
        settings[MANY_NODES] = "0"
        if not late:  # else Ray settles it at its start; a setting that it has not read would split the two
            settings[AUTH] = "token"
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # no cloud takes this machine away
    for name, value in settings.items():
        os.environ.setdefault(name, value)
