"""Indexing again reads what is new or has changed, and nothing else; the result is that of reading everything."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from isthmus import storage
from isthmus.data import manifest as module
from isthmus.data import ranges, reuse
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.errors import StorageError
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar

FILES = ("manifest.parquet", "manifest.json")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read. Files count as settled at once: no test waits for a clock."""
    names: list[str] = []
    real = module.scan_shard

    def noting(url: str, name: str, *rest: Any) -> Any:
        names.append(name)
        return real(url, name, *rest)

    monkeypatch.setattr(module, "scan_shard", noting)
    monkeypatch.setattr(reuse, "SETTLED_S", -60.0)
    return names


def faulty_set(folder: Path) -> Path:
    """Six shards: three whole tars, a Parquet file, one with a sample without caption, one cut short."""
    make_dataset(folder, 9, per_shard=3)
    make_parquet(folder / "more.parquet", 5)
    write_tar(folder / "poor.tar", {"a.png": image_bytes(50), "b.png": image_bytes(51), "b.txt": b"words"})
    cut = write_tar(folder / "cut.tar", {"c.png": image_bytes(52), "c.txt": b"words", "d.png": image_bytes(53)})
    cut.write_bytes(cut.read_bytes()[:-1500])
    return folder


def files_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def same_as_read_whole(folder: Path) -> bool:
    """Whether the manifest is, byte for byte, the one that reading every shard gives."""
    now = files_of(folder)
    index(str(folder), fresh=True)
    return files_of(folder) == now


def test_nothing_is_read_when_nothing_has_changed(tmp_path: Path, scanned: list[str]) -> None:
    first = index(str(faulty_set(tmp_path)))
    assert len(first.problems) == 2 and first.reused == 0 and len(scanned) == 6
    before = files_of(tmp_path)
    scanned.clear()
    again = index(str(tmp_path))
    assert scanned == [] and again.reused == 6
    assert (again.samples, again.digest, again.problems) == (first.samples, first.digest, first.problems)
    assert files_of(tmp_path) == before and same_as_read_whole(tmp_path)
    assert len(scanned) == 6, "--fresh reads all"


def test_only_what_is_new_or_changed_is_read(tmp_path: Path, scanned: list[str]) -> None:
    index(str(faulty_set(tmp_path)))
    scanned.clear()
    make_dataset(tmp_path / "a-folder-before-the-others", 2, start=40)
    write_tar(tmp_path / "poor.tar", {"a.png": image_bytes(50), "a.txt": b"mended"})
    (tmp_path / "shard-00001.tar").unlink()
    report = index(str(tmp_path))
    assert sorted(scanned) == ["a-folder-before-the-others/shard-00000.tar", "poor.tar"]
    assert (report.reused, report.shards) == (4, 6)
    keys = Manifest.load(str(tmp_path)).table["key"].to_pylist()
    assert keys[:2] == ["s00040", "s00041"] and "s00004" not in keys and keys.count("a") == 1
    assert same_as_read_whole(tmp_path)
    samples = list(read_rows(Manifest.load(str(tmp_path)), range(len(keys))))
    assert [s.key for s in samples if isinstance(s, RawSample)] == keys


@pytest.mark.parametrize("disguised", [False, True])
def test_another_content_of_the_same_size_is_noticed(tmp_path: Path, scanned: list[str], disguised: bool) -> None:
    make_dataset(tmp_path, 4, per_shard=2)
    first = index(str(tmp_path))
    scanned.clear()
    shard = tmp_path / "shard-00001.tar"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    changed = shard.read_bytes().replace(b"picture number 3", b"picture number 7")
    assert len(changed) == shard.stat().st_size
    shard.write_bytes(changed)
    if disguised:  # as a copy that keeps times does, or a build that sets them all to one date
        os.utime(shard, ns=times)
        assert shard.stat().st_mtime_ns == times[1]
    report = index(str(tmp_path))
    assert scanned == ["shard-00001.tar"] and report.reused == 1 and report.digest != first.digest
    assert same_as_read_whole(tmp_path)


def test_a_file_that_changed_a_moment_ago_is_read_again(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "SETTLED_S", 3600.0)
    make_dataset(tmp_path, 2)
    index(str(tmp_path))
    index(str(tmp_path))
    assert len(scanned) == 2


def test_other_rules_or_a_manifest_that_was_touched_read_everything(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_set(tmp_path)
    assert index(str(tmp_path)).samples == index(str(tmp_path), captions="optional").samples - 1
    assert len(scanned) == 12, "an image without a caption is a fault of one and a sample of the other"
    header = tmp_path / "manifest.json"
    header.write_text(header.read_text().replace('"samples": 3', '"samples": 4', 1))
    assert index(str(tmp_path), captions="optional").reused == 0
    assert index(str(tmp_path), captions="optional").reused == 6
    monkeypatch.setattr(reuse, "SCAN_RULES", reuse.SCAN_RULES + 1)
    assert index(str(tmp_path), captions="optional").reused == 0
    (tmp_path / reuse.STAMPS_FILE).write_text("{]")
    assert index(str(tmp_path), captions="optional").reused == 0
    (tmp_path / reuse.STAMPS_FILE).unlink()
    assert index(str(tmp_path), captions="optional").reused == 0
    assert same_as_read_whole(tmp_path) is False, "the last index wanted captions, as this one does not"


def test_a_shard_that_the_store_failed_to_give_is_tried_again(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 4, per_shard=2)
    with monkeypatch.context() as broken:
        read = ranges.RangeReader.read

        def failing(reader: ranges.RangeReader, offset: int, length: int) -> bytes:
            if reader.url.endswith("00001.tar"):
                raise StorageError("The store does not answer.")
            return read(reader, offset, length)

        broken.setattr(ranges.RangeReader, "read", failing)
        report = index(str(tmp_path))
    assert report.samples == 2 and "does not answer" in report.problems[0].reason
    scanned.clear()
    again = index(str(tmp_path))
    assert (again.samples, again.reused, scanned, again.problems) == (4, 1, ["shard-00001.tar"], ())


def test_check_after_another_index_sees_the_new_shards(tmp_path: Path, scanned: list[str]) -> None:
    make_dataset(tmp_path, 2)
    make_parquet(tmp_path / "x.parquet", 3)
    index(str(tmp_path))
    assert check(str(tmp_path)).ok
    make_dataset(tmp_path, 3)
    make_parquet(tmp_path / "x.parquet", 6)
    index(str(tmp_path))
    assert check(str(tmp_path)).ok
    last = next(iter(read_rows(Manifest.load(str(tmp_path)), [8])))
    assert isinstance(last, RawSample) and last.image == image_bytes(5), "not a row group of the file that was"


def test_stamps_of_a_store_that_names_none_and_of_one_that_does(
    tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 2)
    url = "memory://reuse/set"
    storage.write_bytes(f"{url}/a.tar", (tmp_path / "shard-00000.tar").read_bytes())
    try:
        assert [index(url).samples, index(url).reused] == [2, 0], "in memory there is no ETag: always read"
        filesystem, _ = storage.resolve(url)
        assert isinstance(filesystem, pafs.PyFileSystem)
        inner = filesystem.handler.fs
        tag = SimpleNamespace(value="one")
        plain = type(inner).info
        monkeypatch.setattr(type(inner), "info", lambda self, path, **k: {**plain(self, path, **k), "etag": tag.value})
        assert [index(url).reused, index(url).reused] == [0, 1]
        tag.value = "two"
        assert index(url).reused == 0
    finally:
        storage.delete("memory://reuse")


def test_the_public_table_keeps_its_columns(tmp_path: Path, scanned: list[str]) -> None:
    index(str(faulty_set(tmp_path)))
    expected = [
        ("id", pa.int64()), ("shard", pa.int32()), ("key", pa.string()), ("image_offset", pa.int64()),
        ("image_length", pa.int64()), ("image_ext", pa.string()), ("text_offset", pa.int64()),
        ("text_length", pa.int64()), ("text_ext", pa.string()), ("meta_offset", pa.int64()),
        ("meta_length", pa.int64()), ("row", pa.int64()), ("image_id", pa.int64()),
    ]  # fmt: skip
    for _ in range(2):
        schema = pq.read_schema(tmp_path / "manifest.parquet")
        assert [(field.name, field.type) for field in schema] == expected
        index(str(tmp_path))


def test_the_digest_of_data_is_the_one_it_always_was(tmp_path: Path) -> None:
    """Feature caches and runs name their data by it: a change here makes every one of them useless."""
    write_tar(
        tmp_path / "a.tar", {"a.png": b"x", "a.txt": b"one", "a.cls": b"3", "b.png": b"y", "b.json": b'{"caption":"b"}'}
    )
    rest = {"c.jpg": b"z" * 700, "c.json": b'{"caption":"b"}', "c.txt": b"c", "d.png": b"no caption"}
    write_tar(tmp_path / "sub/b.tar", rest, end=False)
    assert index(str(tmp_path)).digest == "035910014c4e125e27db982790ad431d3f7c926d65c9dc2f5ed52b49ba1fcb4c"
