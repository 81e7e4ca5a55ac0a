"""The data plane on a real S3 server: index, read, train from it, cache to it, and errors that say what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus import storage
from isthmus.contracts import Sample
from isthmus.data import assembly, encode, pages
from isthmus.data.features import CacheMeta, FeatureCache, part_bytes
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.quarantine import Quarantine, read_quarantine
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.errors import DataError, StorageError
from isthmus.testing import s3
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet

pytestmark = pytest.mark.s3


@pytest.fixture
def server(s3_server: s3.S3Server) -> Iterator[s3.S3Server]:
    with s3.environment(s3_server.environment):
        yield s3_server


def upload(folder: Path, url: str) -> str:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        storage.write_bytes(storage.join(url, str(path.relative_to(folder))), path.read_bytes())
    return url


def test_storage_speaks_s3(server: s3.S3Server) -> None:
    url = server.url("plain", "x.bin")
    storage.write_bytes(url, bytes(range(200)))
    assert storage.read_range(url, 150, 10) == bytes(range(150, 160)) and storage.size(url) == 200
    assert storage.list_files(server.url("plain")) == [(url, 200)]
    assert storage.exists(server.url("plain")) and not storage.exists(server.url("plainer"))
    big = np.random.default_rng(0).bytes(12 << 20)  # in several parts
    storage.write_bytes(server.url("plain", "big"), big)
    assert storage.read_bytes(server.url("plain", "big")) == big
    storage.ensure_writable(server.url("fresh"))
    storage.delete(server.url("plain"))
    assert not storage.exists(url)


def test_errors_say_what_is_wrong(server: s3.S3Server) -> None:
    url = server.url("errors", "train.tar")
    storage.write_bytes(url, b"x")
    with pytest.raises(StorageError, match=r"Did you mean 'train\.tar'\?"):
        storage.read_bytes(server.url("errors", "trian.tar"))
    with pytest.raises(StorageError, match=r"bucket 'nowhere' of .* does not exist"):
        storage.ensure_readable("s3://nowhere/x")
    wrong = {
        "AWS_SECRET_ACCESS_KEY=wrong": "secret key used for .* is wrong",
        "AWS_ACCESS_KEY_ID=stranger": "does not know the access key",
    }
    for setting, message in wrong.items():
        name, _, value = setting.partition("=")
        with s3.environment({name: value}), pytest.raises(StorageError, match=message):
            storage.read_bytes(url)
    reader = {"AWS_ACCESS_KEY_ID": server.reader_key, "AWS_SECRET_ACCESS_KEY": server.reader_secret}
    with s3.environment(reader):
        assert storage.read_bytes(url) == b"x"
        with pytest.raises(StorageError, match=r"Access to .* is denied"):
            storage.ensure_writable(server.url("errors"))
    with s3.environment({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}), pytest.raises(StorageError, match="be reached"):
        storage.exists(url)


def test_index_check_and_read(server: s3.S3Server, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", 20, per_shard=6)
    make_parquet(tmp_path / "set" / "more.parquet", 5)
    local = index(str(tmp_path / "set"))
    url = upload(tmp_path / "set", server.url("set"))
    assert index(url) == local and check(url).ok
    manifest = Manifest.load(url)
    assert manifest.digest == local.digest
    rows = [21, 3, 20, 19, 0, 3]
    samples = list(read_rows(manifest, rows))
    assert all(isinstance(s, RawSample) for s in samples)
    keys = manifest.table["key"].take(rows).to_pylist()
    assert [s.key for s in samples] == keys
    for sample in samples:
        assert isinstance(sample, RawSample) and sample.image == image_bytes(int(sample.key[1:]))
    with pytest.raises(DataError, match="holds no"):
        storage.write_bytes(server.url("nothing", "readme.txt"), b"x")
        index(server.url("nothing"))


def test_an_object_that_became_shorter_while_it_was_open_gives_no_foreign_bytes(
    server: s3.S3Server, tmp_path: Path
) -> None:
    make_dataset(tmp_path / "cut", 8, per_shard=8)
    url = upload(tmp_path / "cut", server.url("cut"))
    index(url)
    manifest = Manifest.load(url)
    assert all(isinstance(sample, RawSample) for sample in read_rows(manifest, range(8)))  # its handle stays open
    shard = manifest.url(0)
    whole = storage.read_bytes(shard)
    ends = [row["meta_offset"] + row["meta_length"] for row in manifest.table.to_pylist()]
    storage.write_bytes(shard, whole[: ends[3]])
    found = list(read_rows(manifest, range(8)))
    assert [sample.image for sample in found if isinstance(sample, RawSample)] == [image_bytes(n) for n in range(4)]
    assert all("it has changed, index it again" in one.reason for one in found[4:] if isinstance(one, Failure))
    assert len([one for one in found if isinstance(one, Failure)]) == 4
    for missing in (1, 5, 40):  # a handle that was opened before, and little that is gone
        source = storage.open_input(shard)
        storage.write_bytes(shard, whole[: ends[3] - missing])
        try:
            read = storage.read_up_to(source, ends[3] - 60, 60)
        except OSError:
            continue
        assert len(read) < 60, missing
        storage.write_bytes(shard, whole[: ends[3]])
    with pytest.raises(StorageError, match="does not hold the 100 bytes"):
        storage.read_range(shard, ends[3] - 50, 100)


def test_a_paged_manifest_is_read_by_range(
    server: s3.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "paged", 30, per_shard=9)
    url = upload(tmp_path / "paged", server.url("paged"))
    whole = index(url, fresh=True)
    table = Manifest.load(url).table
    monkeypatch.setattr(assembly, "PAGED_FROM", 0)
    monkeypatch.setattr(pages, "PAGE_ROWS", 4)
    assert index(url, fresh=True) == whole and storage.exists(f"{url}/{pages.PAGES_FILE}")
    manifest = Manifest.load(url)
    assert isinstance(manifest.rows, pages.Pages) and manifest.digest == whole.digest
    numbers = [29, 3, 3, 17, 0]
    assert manifest.take(numbers).equals(table.take(numbers))
    assert [s.image for s in read_rows(manifest, [5, 28]) if isinstance(s, RawSample)] == [
        image_bytes(int(key[1:])) for key in table["key"].take([5, 28]).to_pylist()
    ]
    there = storage.read_bytes(f"{url}/{pages.PAGES_FILE}")
    storage.write_bytes(f"{url}/{pages.PAGES_FILE}", there[:-40])
    with pytest.raises(DataError, match=r"again"):
        Manifest.load(url).take([0])


def test_indexing_again_goes_by_etags(server: s3.S3Server, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", 6, per_shard=2)
    url = upload(tmp_path / "again", server.url("again"))
    first = index(url)
    again = index(url)
    assert (first.reused, again.reused, again.digest) == (0, 3, first.digest)
    shard = tmp_path / "again" / "shard-00001.tar"
    storage.write_bytes(f"{url}/{shard.name}", shard.read_bytes().replace(b"picture number 3", b"picture number 7"))
    changed = index(url)
    assert changed.reused == 2 and changed.digest != first.digest
    files = [storage.read_bytes(f"{url}/manifest.{kind}") for kind in ("json", "parquet")]
    index(url, fresh=True)
    assert files == [storage.read_bytes(f"{url}/manifest.{kind}") for kind in ("json", "parquet")]


def test_a_table_names_images_of_its_bucket(server: s3.S3Server) -> None:
    url = server.url("named", "set")
    for n in range(40):
        storage.write_bytes(server.url("named", f"images/{n}.png"), image_bytes(n))
    uris = [server.url("named", f"images/{n}.png") for n in range(40)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"path": [*uris, "s3://other/x.png"], "caption": ["words"] * 41}), sink)
    storage.write_bytes(f"{url}/x.parquet", sink.getvalue().to_pybytes())
    report = index(url)
    assert report.samples == 40 and "s3://other/x.png lies outside of s3://lake" in report.problems[0].reason
    rows = list(range(39, -1, -1))
    samples = list(read_rows(Manifest.load(url), rows))
    assert [s.image for s in samples if isinstance(s, RawSample)] == [image_bytes(n) for n in rows]


def test_quarantine_and_cache_live_on_s3(server: s3.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Quarantine(server.url("quarantine")) as quarantine:
        quarantine.add(Failure(5, "k", "x.tar", 0, "broken"))
    assert [f.id for f in read_quarantine(server.url("quarantine"))] == [5]

    monkeypatch.setenv("ISTHMUS_SCRATCH", str(tmp_path / "scratch"))
    url = server.url("cache")
    meta = CacheMeta("d", "m", "e", "t", {}, 2, 3, "float16", 4, parts=2)
    features = np.arange(48, dtype=np.float16).reshape(8, 2, 3)
    commits = []
    for part in range(2):
        samples = [Sample(part * 4 + n, f"k{n}", ("words",)) for n in range(4)]
        commits.append(encode.write_part(url, part, part_bytes(samples, features[part * 4 : part * 4 + 4]), 4, []))
    encode._close(url, meta, commits, 8)
    cache = FeatureCache.open(url)
    np.testing.assert_array_equal(cache.rows([6, 1]), features[[6, 1]])
    copied = {p: p.stat().st_mtime_ns for p in (tmp_path / "scratch").rglob("*.arrow")}
    assert len(copied) == 2
    FeatureCache.open(url)
    assert copied == {p: p.stat().st_mtime_ns for p in (tmp_path / "scratch").rglob("*.arrow")}
    for path in copied:
        path.unlink()
    storage.write_bytes(server.url("cache", "parts", "part-00001.arrow"), b"something else")
    with pytest.raises(DataError, match=r"part-00001\.arrow is damaged"):
        FeatureCache.open(url)
