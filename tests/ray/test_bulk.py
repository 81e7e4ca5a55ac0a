"""Bulk jobs on real Ray: killed and resumed, with unreadable images and images that take their process down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.data.manifest import Manifest
from isthmus.errors import DataError, IsthmusError
from isthmus.inference.commits import Chunk, Job, Ledger, Quarantined, chunks
from isthmus.inference.pool import KILLED, LOADS, Done, Pool
from isthmus.testing.shards import image_bytes, write_tar

sys.path.insert(0, str(Path(__file__).parent))
import bulk_driver

pytestmark = pytest.mark.ray
IMAGES, CORRUPT = 26, (3, 17)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars without captions; two of the images are cut short. Not indexed."""
    folder = tmp_path_factory.mktemp("lake")
    for shard in range(2):
        members = {}
        for number in range(shard * 13, (shard + 1) * 13):
            data = image_bytes(number)
            members[f"i{number:04d}.png"] = data[: len(data) // 2] if number in CORRUPT else data
        write_tar(folder / f"shard-{shard}.tar", members)
    return folder


def captions(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted((out / "parts").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def wait_for_commits(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while len(list((out / "commits").glob("*.json"))) < count:
        if process.poll() is not None:
            raise AssertionError(f"the driver ended by itself with {process.returncode}")
        time.sleep(0.05)


def test_a_killed_job_resumes_and_every_image_is_there_once(ray_cluster: Any, lake: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster.get_runtime_context().gcs_address}
    command = [sys.executable, bulk_driver.__file__, str(lake), str(out), "0.5"]
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_for_commits(out, 2, first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (out / "report.json").exists()
    (out / "parts" / "part-000099.parquet.tmp").write_bytes(b"torn")

    report = bulk_driver.run(str(lake), str(out), actors=1)
    manifest = Manifest.load(str(lake))
    rows, aside = captions(out), pq.read_table(out / "quarantine.parquet").to_pylist()
    assert (report.expected, report.captioned, report.quarantined) == (IMAGES, IMAGES - 2, 2)
    assert 2 <= report.skipped_chunks < 7
    assert sorted([r["id"] for r in rows] + [q["id"] for q in aside]) == sorted(manifest.ids.tolist())
    assert [q["key"] for q in aside] == [f"i{n:04d}" for n in CORRUPT]
    assert all(q["reason"] and len(q["digest"]) == 64 and q["shard"].endswith(".tar") for q in aside)
    assert rows[0]["caption"].startswith("mean ") and rows[0]["model"] == "models:/stand-in/1"
    assert rows[0]["shard"] == "shard-0.tar" and len({r["caption"] for r in rows}) > 20

    again = bulk_driver.run(str(lake), str(out))
    assert (again.skipped_chunks, again.captioned, again.images_per_s) == (7, IMAGES - 2, 0.0)
    with pytest.raises(DataError, match=r"another job.*num_beams"):
        bulk_driver.run(str(lake), str(out), num_beams=3)
    with pytest.raises(DataError, match="max_failed_share"):
        bulk_driver.run(str(lake), str(out), max_failed_share=0.0)


class _Work:
    """Doubles numbers; some rows end the process."""

    def __init__(self, deadly: Sequence[int]) -> None:
        self.deadly = set(deadly)

    def process(self, rows: Sequence[int]) -> Done:
        if self.deadly & set(rows):
            os._exit(1)
        table = pa.table({"id": pa.array(list(rows), pa.int64()), "twice": pa.array([2 * r for r in rows], pa.int64())})
        return Done(table, (), {"texts": table.select(["id"])})

    def blame(self, row: int, reason: str) -> Quarantined:
        return Quarantined(row, str(row), "shard", 0, reason)


def dying(folder: Path, times: int) -> Any:
    """Makes workers of which the first ``times`` end their process."""

    def load() -> _Work:
        for number in range(times):
            try:
                (folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            os._exit(1)
        return _Work(())

    return load


def test_a_process_that_dies_while_it_loads_is_replaced_a_few_times(ray_cluster: Any, tmp_path: Path) -> None:
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for times, good in ((LOADS - 1, True), (LOADS, False)):
        (marks := tmp_path / f"marks{times}").mkdir()
        ledger, plan = Ledger(str(tmp_path / f"out{times}"), Job("test", {})), chunks(4, 2)
        ledger.open()
        work = Pool(dying(marks, times), ledger, actors=1, cpus=0.5, gpus=0).run(plan)
        if good:
            assert sum(commit.rows for commit in work) == 4
        else:
            with pytest.raises(IsthmusError, match="died while it loaded the model"):
                list(work)


def pool(out: Path, deadly: Sequence[int], size: int, samples: int) -> tuple[Ledger, list[Chunk], Pool]:
    import ray

    ledger, plan = Ledger(str(out), Job("test", {})), chunks(samples, size)
    ledger.open()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return ledger, plan, Pool(lambda: _Work(deadly), ledger, actors=2, cpus=0.5, gpus=0)


def test_a_deadly_image_is_isolated_and_the_rest_is_done(ray_cluster: Any, tmp_path: Path) -> None:
    ledger, plan, workers = pool(tmp_path / "out", [3], size=2, samples=5)
    assert {commit.index for commit in workers.run(plan)} == {0, 1, 2}
    rows, aside = ledger.reconcile(plan, range(5))
    assert (rows, [(q.id, q.reason) for q in aside]) == (4, [(3, KILLED)])
    assert pq.read_table(tmp_path / "out" / "parts" / "part-000001.parquet").to_pydict() == {"id": [2], "twice": [4]}
    assert pq.read_table(tmp_path / "out" / "texts" / "part-000001.parquet")["id"].to_pylist() == [2]


def test_a_worker_that_cannot_start_says_why(ray_cluster: Any, tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "out"), Job("test", {}))
    ledger.open()

    def refuse() -> Any:
        raise DataError("The model is gone.", "Bring it back.")

    def die() -> Any:
        os._exit(1)

    plan = chunks(4, 2)
    with pytest.raises(DataError, match="The model is gone"):
        list(Pool(refuse, ledger, actors=1, cpus=0.5, gpus=0).run(plan))
    with pytest.raises(IsthmusError, match="while it loaded the model"):
        list(Pool(die, ledger, actors=1, cpus=0.5, gpus=0).run(plan))
