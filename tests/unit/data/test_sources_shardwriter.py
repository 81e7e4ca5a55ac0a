"""Shards: the same bytes for the same pairs, readable by anybody, and nothing that a reader would trip over."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from isthmus.data.shardwriter import Pair, parquet_bytes, tar_bytes, write_shards
from isthmus.errors import DataError

PAIRS = [Pair(f"k{i}", bytes([i]) * 100, "png", (f"caption {i}", "more"), {"b": i, "a": "ä"}) for i in range(5)]


def test_tars_hold_json_captions_and_image_without_time_or_owner() -> None:
    data = tar_bytes(PAIRS)
    assert data == tar_bytes(PAIRS)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        assert [i.name for i in infos[:3]] == ["k0.json", "k0.txt", "k0.png"]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.mode) for i in infos} == {(0, 0, 0, "", 0o644)}
        assert tar.extractfile("k1.txt").read() == b"caption 1\nmore\n"  # type: ignore[union-attr]
        assert tar.extractfile("k1.json").read() == '{"a":"ä","b":1}'.encode()  # type: ignore[union-attr]


def test_parquet_is_the_same_every_time() -> None:
    assert parquet_bytes(PAIRS) == parquet_bytes(PAIRS)


def test_shards_close_by_count_and_by_size(tmp_path: Path) -> None:
    files = list(write_shards(iter(PAIRS), str(tmp_path), folder="train", shard_size=2))
    assert [(f.path, f.samples) for f in files] == [(f"train/train-{i:05d}.tar", n) for i, n in enumerate((2, 2, 1))]
    assert all((tmp_path / f.path).stat().st_size == f.size for f in files)
    assert [f.samples for f in write_shards(PAIRS, str(tmp_path / "x"), folder="t", max_bytes=250)] == [3, 2]
    assert list(write_shards([], str(tmp_path / "y"), folder="t")) == []


@pytest.mark.parametrize(
    "pair",
    [
        Pair("a.b", b"x", "png", ("ok",)),
        Pair("a/b", b"x", "png", ("ok",)),
        Pair("", b"x", "png", ("ok",)),
        Pair("k" * 91, b"x", "png", ("ok",)),
        Pair("a", b"x", "png", ()),
        Pair("a", b"x", "png", ("two\nlines",)),
        Pair("a", b"x", "png", (" ",)),
    ],
)
def test_what_a_shard_cannot_hold_is_refused(pair: Pair) -> None:
    with pytest.raises(DataError):
        tar_bytes([pair])
    with pytest.raises(DataError):
        parquet_bytes([pair])
