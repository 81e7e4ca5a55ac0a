"""Parquet files that name their images: files of the same store are read, what lies elsewhere is refused."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus import storage
from isthmus.data import readers, reuse
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.data.uris import image_url, store_of
from isthmus.errors import DataError
from isthmus.testing.shards import image_bytes


def table(url: str, uris: list[str | None], column: str = "path", **more: list[Any]) -> None:
    rows = {column: uris, "caption": [f"caption {n}" for n in range(len(uris))], **more}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, row_group_size=3)
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def images(folder: str, count: int) -> list[str]:
    for n in range(count):
        storage.write_bytes(f"{folder}/images/{n}.png", image_bytes(n))
    return [f"images/{n}.png" for n in range(count)]


def read(url: str) -> list[RawSample | Failure]:
    manifest = Manifest.load(url)
    return list(read_rows(manifest, range(len(manifest))))


@pytest.mark.parametrize("column", ["path", "image", "file_name", "uri"])
def test_relative_and_absolute_paths_below_the_folder(tmp_path: Path, column: str) -> None:
    folder = tmp_path / "set"
    uris = images(str(folder), 5)
    table(f"{folder}/x.parquet", [*uris[:3], str(folder / uris[3]), f"file://{folder}/{uris[4]}"], column)
    report = index(str(folder))
    assert (report.samples, report.problems) == (5, ()) and check(str(folder)).ok
    samples = read(str(folder))
    assert [s.image for s in samples if isinstance(s, RawSample)] == [image_bytes(n) for n in range(5)]
    assert [s.captions for s in samples if isinstance(s, RawSample)] == [(f"caption {n}",) for n in range(5)]
    assert Manifest.load(str(folder)).table["image_length"][2].as_py() == len(image_bytes(2))
    folder.rename(tmp_path / "moved")
    assert isinstance(read(f"{tmp_path}/moved")[0], RawSample), "relative names go where the folder goes"


def test_a_store_behind_fsspec(tmp_path: Path) -> None:
    url = "memory://tables/set"
    try:
        uris = images(url, 2)
        storage.write_bytes("memory://tables/else.png", image_bytes(9))
        storage.write_bytes("memory://others/else.png", image_bytes(9))
        table(f"{url}/part/x.parquet", [f"{url}/{uris[0]}", "memory://tables/else.png", "memory://others/else.png"])
        report = index(url)
        assert report.samples == 2 and check(url).problems == report.problems
        assert "memory://others/else.png lies outside of memory://tables" in report.problems[0].reason
        assert [s.image for s in read(url) if isinstance(s, RawSample)] == [image_bytes(0), image_bytes(9)]
    finally:
        storage.delete("memory://tables")
        storage.delete("memory://others")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("images/7.png", "images/7.png is not there"),
        ("images", "is not there"),
        ("../secret.png", "'..' in it"),
        ("images/../../secret.png", "'..' in it"),
        ("images/%2e%2e/%2E%2e/secret.png", "'..' in it"),
        ("/etc/hostname", "lies outside of"),
        ("file:///etc/hostname", "lies outside of"),
        ("FILE:///etc/hostname", "lies outside of"),
        ("s3://bucket/x.png", "lies outside of"),
        ("http://169.254.169.254/latest/meta-data", "is a web address"),
        ("HTTPS://example.org/x.png", "is a web address"),
        ("", "URI is empty"),
        (None, "the image is empty"),
    ],
)
def test_what_is_missing_or_elsewhere_is_a_fault_of_its_row(tmp_path: Path, uri: str | None, reason: str) -> None:
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    uris: list[str | None] = [*images(f"{tmp_path}/set", 1), uri]
    table(f"{tmp_path}/set/x.parquet", uris)
    report = index(f"{tmp_path}/set")
    assert report.samples == 1
    assert [(p.shard, p.offset) for p in report.problems] == [("x.parquet", 1)] and reason in report.problems[0].reason


def test_a_folder_whose_name_only_begins_alike_is_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies outside of"):
        image_url(f"{tmp_path}-private/x.png", f"{tmp_path}/x.parquet", [str(tmp_path)])
    with pytest.raises(ValueError, match="web address"):
        image_url("https://example.org@evil.example/x", "/d/x.parquet", ["https://example.org"])
    assert store_of("s3://bucket/a/b.parquet") == "s3://bucket"


def test_places_that_are_allowed_by_name_stay_so_for_readers(tmp_path: Path) -> None:
    uris = images(f"{tmp_path}/pictures", 2)
    table(f"{tmp_path}/set/x.parquet", [f"{tmp_path}/pictures/{uri}" for uri in uris])
    with pytest.raises(DataError, match=r"None of the 1 shard.*--images-from"):
        index(f"{tmp_path}/set")
    index(f"{tmp_path}/set", images_from=[f"{tmp_path}/pictures"])
    assert Manifest.load(f"{tmp_path}/set").images_from == (f"{tmp_path}/pictures",)
    assert all(isinstance(sample, RawSample) for sample in read(f"{tmp_path}/set"))
    header = tmp_path / "set" / "manifest.json"
    header.write_text(header.read_text().replace("pictures", "elsewhere"))
    assert all("lies outside" in s.reason for s in read(f"{tmp_path}/set") if isinstance(s, Failure))


def test_images_that_changed_are_noticed_by_readers_check_and_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "SETTLED_S", -60.0)  # the table itself is as it was
    uris = images(str(tmp_path), 3)
    table(f"{tmp_path}/x.parquet", uris)
    digest = index(str(tmp_path)).digest
    (tmp_path / uris[1]).write_bytes(image_bytes(1, size=(50, 40)))
    (tmp_path / uris[2]).unlink()
    samples = read(str(tmp_path))
    assert isinstance(samples[0], RawSample)
    assert [isinstance(s, Failure) and s.reason for s in samples[1:]] == [
        p.reason for p in check(str(tmp_path)).problems
    ][1:]
    assert isinstance(samples[1], Failure) and "index again" in samples[1].reason
    again = index(str(tmp_path))
    assert (again.samples, again.reused) == (2, 0) and again.digest != digest, "such a table is read each time"
    assert "is not there" in again.problems[0].reason


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "/1.png")
            self.end_headers()
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A host that serves two images, one of them also by a redirect."""
    images(str(tmp_path), 2)
    _Quiet.asked.clear()
    handler = lambda *args: _Quiet(*args, directory=str(tmp_path / "images"))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_nothing_is_fetched_from_a_host_that_was_not_named(tmp_path: Path, web: str) -> None:
    table(f"{tmp_path}/set/x.parquet", [f"{web}/0.png", f"{web}/1.png", f"{web}/away"], column="url")
    with pytest.raises(DataError, match="bring the images into your store first"):
        index(f"{tmp_path}/set")
    assert _Quiet.asked == []
    report = index(f"{tmp_path}/set", images_from=[web])
    assert report.samples == 2 and [problem.offset for problem in report.problems] == [2], "redirects are not followed"
    assert [s.image for s in read(f"{tmp_path}/set") if isinstance(s, RawSample)] == [image_bytes(0), image_bytes(1)]


def test_a_table_without_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"number": [1], "words": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column of image bytes or image files; its columns are number, words"):
        index(str(tmp_path))


def test_an_image_over_the_limit_is_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = images(str(tmp_path), 2)
    table(f"{tmp_path}/x.parquet", uris)
    (tmp_path / "images" / "1.png").write_bytes(bytes(5000))
    index(str(tmp_path))
    monkeypatch.setattr(readers, "MAX_BYTES", 4999)
    opened: list[str] = []
    plain = readers.RangeReader
    monkeypatch.setattr(readers, "RangeReader", lambda url: opened.append(url) or plain(url))
    first, second = read(str(tmp_path))
    assert isinstance(first, RawSample) and isinstance(second, Failure)
    assert second.reason == "the image of 5000 bytes is larger than the limit of 4999" and len(opened) == 1


def test_the_head_of_an_image_is_all_that_is_read(tmp_path: Path) -> None:
    uris = images(str(tmp_path), 1)
    table(f"{tmp_path}/x.parquet", uris)
    index(str(tmp_path))
    sample = next(iter(read_rows(Manifest.load(str(tmp_path)), [0], head=100)))
    assert isinstance(sample, RawSample) and sample.image == image_bytes(0)[:100]
