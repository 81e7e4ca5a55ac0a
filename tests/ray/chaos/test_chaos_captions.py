"""Bulk captioning: a driver that is killed, an actor that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chaos_help import Report, wait_for

from isthmus.data.manifest import Manifest, index
from isthmus.testing.shards import image_bytes, write_tar

sys.path.insert(0, str(Path(__file__).parents[1]))
import bulk_driver

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

IMAGES = 40


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_tar(folder / "a.tar", {f"i{n:04d}.png": image_bytes(n) for n in range(IMAGES)})
    index(str(folder), captions="optional")
    return folder


def start(cluster: Any, lake: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address}
    command = [sys.executable, bulk_driver.__file__, str(lake), str(out), "0.5"]
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def counts(lake: Path, out: Path) -> dict[str, int]:
    """lost, doubled, silent of the captions in ``out``."""
    rows = Counter(i for part in (out / "parts").glob("*.parquet") for i in pq.read_table(part)["id"].to_pylist())
    wanted = set(Manifest.load(str(lake)).ids.tolist())
    told = json.loads((out / "report.json").read_text())["done"]
    lost = len(wanted - set(rows))
    doubled = sum(n - 1 for n in rows.values()) + len(set(rows) - wanted)
    return {"lost": lost, "doubled": doubled, "silent": abs(told - len(rows))}


@pytest.mark.fault("captioning: driver SIGKILL")
def test_the_driver_is_killed(ray_cluster: Any, lake: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "out"
    first = start(ray_cluster, lake, out)
    wait_for(lambda: commits(out) >= 3, process=first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before, struck = commits(out), time.monotonic()
    second = start(ray_cluster, lake, out)
    wait_for(lambda: commits(out) > before, process=second)
    seconds = time.monotonic() - struck
    assert second.wait(300) == 0
    report.add(
        "captioning: driver SIGKILL", recovery_s=seconds, note=f"{before} of 10 chunks kept", **counts(lake, out)
    )


@pytest.mark.fault("captioning: actor SIGKILL")
def test_an_actor_is_killed(ray_cluster: Any, lake: Path, tmp_path: Path, report: Report) -> None:
    import psutil

    out = tmp_path / "out"
    known = {process.pid for process in psutil.process_iter()}
    job = start(ray_cluster, lake, out)
    wait_for(lambda: commits(out) >= 3, process=job)
    actors = [
        p
        for p in psutil.process_iter(["cmdline"])
        if p.pid not in known and "ray::" in " ".join(p.info["cmdline"] or [])
    ]
    busy = [
        p for p in actors if not any(word in " ".join(p.info["cmdline"]) for word in ("IDLE", "MapWorker.__init__"))
    ]
    assert busy, [p.info["cmdline"] for p in actors]
    before, struck = commits(out), time.monotonic()
    busy[0].kill()
    wait_for(lambda: commits(out) > before + 1, process=job)
    seconds = time.monotonic() - struck
    assert job.wait(300) == 0
    report.add("captioning: actor SIGKILL", recovery_s=seconds, **counts(lake, out))
