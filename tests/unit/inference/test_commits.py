"""The books of a bulk job: what counts as done, what is refused, what is found out at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.errors import DataError
from isthmus.inference.commits import Job, Ledger, Quarantined, chunks

IDS = list(range(100, 110))
PLAN = chunks(len(IDS), 4)
JOB = Job("caption", {"model": "m1", "chunk": 4})


def table(ids: list[int]) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64()), "caption": [f"caption {i}" for i in ids]})


def bad(image_id: int) -> Quarantined:
    return Quarantined(image_id, f"k{image_id}", "a.tar", 512, "cut short", "00")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(str(tmp_path / "out"), JOB)
    ledger.open()
    return ledger


def fill(ledger: Ledger, indices: tuple[int, ...] = (0, 1, 2)) -> None:
    for chunk in PLAN:
        if chunk.index in indices:
            ids = IDS[chunk.start : chunk.stop]
            ledger.commit(chunk, table(ids[1:]), [bad(ids[0])])


def test_chunks_cover_all_rows_once() -> None:
    rows = [row for chunk in chunks(1001, 128) for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(1001))
    assert [len(c) for c in PLAN] == [4, 4, 2]


def test_books_balance(ledger: Ledger) -> None:
    fill(ledger)
    rows, aside = ledger.reconcile(PLAN, IDS)
    assert (rows, [q.id for q in aside]) == (7, [100, 104, 108])
    ledger.close(aside, {"expected": 10})
    listed = pq.read_table(Path(ledger.out) / "quarantine.parquet").to_pylist()
    assert listed[0] == {
        "id": 100,
        "key": "k100",
        "shard": "a.tar",
        "offset": 512,
        "reason": "cut short",
        "digest": "00",
    }


def test_only_whole_records_of_this_job_count(ledger: Ledger) -> None:
    fill(ledger)
    assert set(ledger.committed(PLAN)) == {0, 1, 2}
    commits = Path(ledger.out) / "commits"
    (commits / "000000.json").write_text((commits / "000000.json").read_text()[:-20])
    record = json.loads((commits / "000001.json").read_text())
    (commits / "000001.json").write_text(json.dumps({**record, "job": "another"}))
    assert set(ledger.committed(PLAN)) == {2}
    (Path(ledger.out) / "parts" / "part-000002.parquet").unlink()
    assert ledger.committed(PLAN) == {}


def test_a_part_without_commit_record_was_never_done(ledger: Ledger) -> None:
    fill(ledger, (0, 2))
    (Path(ledger.out) / "commits" / "000002.json").unlink()
    assert set(ledger.committed(PLAN)) == {0}
    with pytest.raises(DataError, match="2 of 3 chunks are missing or damaged"):
        ledger.reconcile(PLAN, IDS)


def test_a_damaged_part_is_found_and_done_again(ledger: Ledger) -> None:
    fill(ledger)
    part = Path(ledger.out) / "parts" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1  # the size stays
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"chunk 1: the digest of parts/part-000001\.parquet differs"):
        ledger.reconcile(PLAN, IDS)
    assert set(ledger.committed(PLAN)) == {0, 2}
    fill(ledger, (1,))
    assert ledger.reconcile(PLAN, IDS)[0] == 7


def test_ids_must_be_the_manifests(ledger: Ledger) -> None:
    fill(ledger)
    with pytest.raises(DataError, match="its ids are not the manifest's"):
        ledger.reconcile(PLAN, [*IDS[:-1], 999])


@pytest.mark.parametrize("ids", [[100, 101, 102], [100, 100, 101, 102], [100, 101, 102, 103, 104]])
def test_a_chunk_that_does_not_add_up_is_not_committed(ledger: Ledger, ids: list[int]) -> None:
    with pytest.raises(DataError, match="Chunk 0 has 4 images"):
        ledger.commit(PLAN[0], table(ids), [])
    assert ledger.committed(PLAN) == {}


def test_the_same_job_may_come_back_and_another_may_not(ledger: Ledger) -> None:
    Ledger(ledger.out, Job("caption", {"chunk": 4, "model": "m1"})).open()
    with pytest.raises(DataError, match="model: there 'm1', now 'm2'"):
        Ledger(ledger.out, Job("caption", {"model": "m2", "chunk": 4})).open()
    with pytest.raises(DataError, match="kind is caption, asked for embed"):
        Ledger(ledger.out, Job("embed", dict(JOB.facts))).open()


def test_a_folder_with_other_parquet_files_is_not_taken_over(tmp_path: Path) -> None:
    pq.write_table(table([1]), tmp_path / "mine.parquet")
    with pytest.raises(DataError, match=r"no job\.json"):
        Ledger(str(tmp_path), JOB).open()
