"""What every test starts from: a quiet, offline environment, and one Ray cluster for the whole session."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from isthmus.testing.s3 import S3Server

# Before torch, ray or transformers are imported anywhere. A user's own settings must not reach the tests.
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "RAY_JOB_ID", "ISTHMUS_API_KEY"):
    os.environ.pop(_name, None)
for _name in [n for n in os.environ if n.startswith("AWS_")]:
    del os.environ[_name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "ISTHMUS_PROGRESS": "0",
    "RAY_AUTH_MODE": "disabled",  # a token file of the user's must not shut the tests out
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on loopback
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Shorter than any proxy needs: our service starts only because it grants its own time.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "0.2",
}

from isthmus.compat import ensure_torchvision  # noqa: E402 - after the environment, before any test imports timm

ensure_torchvision()

ATTEMPTS = 4
ROOT = Path(__file__).resolve().parent.parent


GROUPS = ("ray", "jobs")
"""Groups that start a Ray cluster; they go first, for they take longest."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests share a process when several run: those of one Ray cluster, else those of one file.

    First of all hooks, since xdist reads the marks in a hook of its own.
    """
    for item in items:
        file = item.path
        beside = file.relative_to(ROOT).as_posix()
        group = "jobs" if file.name == "test_jobs.py" else "ray" if file.parent.name == "ray" else beside
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: next(m.args[0] for m in item.iter_markers("xdist_group")) not in GROUPS)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One local Ray cluster of eight logical CPUs for the session; yields the ``ray`` module.

    The CPUs are logical because two trainers, Ray Data and an actor together need more slots than a small machine
    has cores; with as many as cores they wait for one another for ever.
    """
    import ray

    for attempt in range(1, ATTEMPTS + 1):
        if ray.is_initialized():
            break
        try:
            ray.init(
                address="local",
                num_cpus=8,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=400 * 2**20,
                _node_ip_address="127.0.0.1",
            )
        except Exception:  # a node that gets no CPU for 15 seconds gives up starting; a busy machine deserves patience
            ray.shutdown()
            if attempt == ATTEMPTS:
                raise
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def _no_cluster_beside(request: pytest.FixtureRequest) -> None:
    """Ends the session's cluster once its tests, which come first, are through: the code under test would use it."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized() and request.node.get_closest_marker("ray") is None:
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running SeaweedFS; tests lay ``s3_server.environment`` over their own."""
    from isthmus.testing import s3

    with s3.s3_server() as server:
        yield server


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that ``runs/`` and ``data/`` of the repository stay untouched."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
