"""Rows in, samples out: one for one, in order, whatever the store does."""

from pathlib import Path

import pyarrow as pa
import pytest

from isthmus.data import ranges
from isthmus.data.manifest import Manifest, index
from isthmus.data.ranges import RangeReader, Sequential
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.errors import StorageError
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    make_dataset(tmp_path, 20, per_shard=6)
    index(str(tmp_path))
    return Manifest.load(str(tmp_path))


def test_rows_come_back_in_the_order_asked(manifest: Manifest) -> None:
    rows = [7, 0, 19, 7, 3, 12]
    samples = list(read_rows(manifest, rows))
    assert [s.key for s in samples] == [f"s{row:05d}" for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert isinstance(sample, RawSample) and sample.image == image_bytes(row)
        assert sample.captions == (f"picture number {row}", f"noise {row}")
        assert sample.meta == {"number": row} and sample.id == manifest.ids[row]


def test_parquet_rows(tmp_path: Path) -> None:
    make_parquet(tmp_path / "x.parquet", 11, row_group=4)
    index(str(tmp_path))
    samples = list(read_rows(Manifest.load(str(tmp_path)), [10, 0, 4, 3]))
    assert [s.key for s in samples] == ["p10", "p0", "p4", "p3"]
    assert [s.image for s in samples if isinstance(s, RawSample)] == [image_bytes(n) for n in (10, 0, 4, 3)]
    assert samples[0].captions == ("row 10",) and samples[0].meta["number"] == 10  # type: ignore[union-attr]


def test_json_captions(tmp_path: Path) -> None:
    members = {
        "a.png": b"x",
        "a.json": b'{"caption": "one", "licence": "free"}',
        "b.png": b"x",
        "b.json": b'{"captions": ["two", " three "]}',
    }
    write_tar(tmp_path / "x.tar", members)
    index(str(tmp_path))
    first, second = read_rows(Manifest.load(str(tmp_path)), [0, 1])
    assert isinstance(first, RawSample) and isinstance(second, RawSample)
    assert first.captions == ("one",) and first.meta == {"licence": "free"}
    assert second.captions == ("two", "three")


def test_a_shard_that_shrank_gives_failures_and_not_wrong_bytes(manifest: Manifest, tmp_path: Path) -> None:
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:2048])
    ranges.open_range.forget()
    answers = list(read_rows(manifest, range(20)))
    failed = [a for a in answers if isinstance(a, Failure)]
    assert len(answers) == 20 and failed
    assert {f.shard for f in failed} == {"shard-00001.tar"} and all("index it again" in f.reason for f in failed)
    assert all(a.image == image_bytes(row) for row, a in enumerate(answers) if isinstance(a, RawSample))


class Flaky:
    """A handle that fails now and then, and cuts answers short."""

    def __init__(self, data: bytes, state: dict) -> None:
        self.data, self.state = data, state

    def size(self) -> int:
        return len(self.data)

    def seek(self, offset: int) -> None:
        self.offset = offset

    def readinto(self, buffer: bytearray) -> int:
        self.state["calls"] += 1
        if self.state["calls"] % 4 in (1, 3):  # the third asks for the last byte of what the second cut short
            raise OSError("connection reset")
        length = len(buffer) // (2 if self.state["calls"] % 4 == 2 else 1)
        buffer[:length] = self.data[self.offset : self.offset + length]
        # Arrow's S3 client counts what was asked for, not what came.
        return len(buffer)


def test_failing_and_cut_reads_are_repeated_at_their_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    state = {"calls": 0}
    monkeypatch.setattr(ranges.storage, "open_input", lambda url: Flaky(data, state))
    monkeypatch.setattr(ranges.time, "sleep", lambda seconds: None)
    reader = RangeReader("s3://bucket/x")
    assert reader.read(1000, 300) == data[1000:1300]
    handle = Sequential(reader, chunk=777)
    assert handle.read(100) == data[:100]
    handle.seek(5000)
    assert handle.read(20) == data[5000:5020]
    handle.drain()
    import hashlib

    assert handle.digest == hashlib.sha256(data).hexdigest()


def test_a_store_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Flaky):
        def readinto(self, buffer: bytearray) -> int:
            raise pa.ArrowInvalid("no")

    monkeypatch.setattr(ranges.storage, "open_input", lambda url: Dead(bytes(10), {}))
    monkeypatch.setattr(ranges.time, "sleep", lambda seconds: None)
    with pytest.raises(StorageError, match="after 5 attempts: no"):
        RangeReader("s3://bucket/x").read(0, 4)
