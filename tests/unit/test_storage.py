"""Storage on a local disk and through fsspec; the S3 half is in tests/e2e/test_s3_plane.py."""

import threading
from pathlib import Path

import pytest

from isthmus import storage
from isthmus.errors import StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_join_and_locality() -> None:
    assert storage.join("s3://b/x/", "y", "z.tar") == "s3://b/x/y/z.tar"
    assert storage.join("data", "s3://b/x") == "s3://b/x" and storage.join("data", "/abs") == "/abs"
    assert storage.is_local("data/x") and storage.is_local("file:///x") and not storage.is_local("s3://b/x")
    assert storage.local_path("file:///x/y") == Path("/x/y")
    with pytest.raises(StorageError, match="no local path"):
        storage.local_path("s3://b/x")


def test_bytes_ranges_and_sizes(tmp_path: Path) -> None:
    url = str(tmp_path / "deep" / "er" / "x.bin")
    storage.write_bytes(url, bytes(range(100)))
    assert storage.read_bytes(url) == bytes(range(100)) and storage.size(url) == 100
    assert storage.read_range(url, 10, 5) == bytes(range(10, 15))
    with pytest.raises(StorageError, match="does not hold the 20 bytes asked for at 90"):
        storage.read_range(url, 90, 20)
    with storage.open_input(url) as source:
        assert storage.read_up_to(source, 50, 3) == bytes([50, 51, 52])
        assert storage.read_up_to(source, 80, 11) == bytes(range(80, 91)), "it ends as an unread byte does"
        assert storage.read_up_to(source, 95, 9) == bytes(range(95, 100)) and storage.read_up_to(source, 5, 0) == b""


def test_listing_is_recursive_sorted_and_skips_hidden_files(tmp_path: Path) -> None:
    for name in ("b.tar", "a/c.tar", "a/d.txt", ".hidden.tar"):
        storage.write_bytes(str(tmp_path / name), b"xy")
    assert storage.list_files(str(tmp_path), (".tar",)) == [(f"{tmp_path}/a/c.tar", 2), (f"{tmp_path}/b.tar", 2)]
    assert len(storage.list_files(f"{tmp_path}/")) == 3
    assert storage.list_files(f"{tmp_path}/b.tar") == [(f"{tmp_path}/b.tar", 2)]


def test_relative_urls_keep_their_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("data/x.tar", b"1")
    assert storage.list_files("data") == [("data/x.tar", 1)]


def test_writes_are_whole_or_absent(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    contents = [bytes([n]) * 200_000 for n in range(8)]
    storage.write_bytes(url, contents[0])
    stop, seen = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            seen.append(storage.read_bytes(url))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for content in contents * 3:
        storage.write_bytes(url, content)
    stop.set()
    watcher.join()
    assert seen and all(content in contents for content in seen)
    assert names(tmp_path) == ["x"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "folder"), b"x")
    assert names(tmp_path) == ["folder"]


def test_missing_paths_name_their_nearest_neighbour(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "train.tar"), b"")
    with pytest.raises(StorageError, match=r"nothing at .*trian\.tar\. Did you mean 'train\.tar'\?"):
        storage.read_bytes(str(tmp_path / "trian.tar"))
    with pytest.raises(StorageError, match="nothing at"):
        storage.ensure_readable(str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="nothing at"):
        storage.list_files(str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="nothing at"):
        storage.size(str(tmp_path))


def test_delete_and_exists(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b")
    storage.write_bytes(url, b"x")
    assert storage.exists(url) and storage.exists(str(tmp_path / "a"))
    storage.delete(str(tmp_path / "a"))
    assert not storage.exists(url)
    storage.delete(url)  # nothing there is no error
    storage.make_dirs(str(tmp_path / "p" / "q"))
    storage.ensure_writable(str(tmp_path / "p"))
    assert names(tmp_path / "p") == ["q"]


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        storage.ensure_writable(str(tmp_path / "file"))


def test_other_schemes_go_through_fsspec() -> None:
    storage.write_bytes("memory://isthmus/x/y.txt", b"hello")
    assert storage.read_range("memory://isthmus/x/y.txt", 1, 3) == b"ell"
    assert storage.list_files("memory://isthmus") == [("memory://isthmus/x/y.txt", 5)]
    storage.delete("memory://isthmus/x/y.txt")
    assert not storage.exists("memory://isthmus/x/y.txt")


def test_unknown_schemes_and_urls_without_bucket() -> None:
    with pytest.raises(StorageError, match="scheme 'foo://' cannot be opened"):
        storage.exists("foo://x/y")
    with pytest.raises(StorageError, match="names no bucket"):
        storage.exists("s3://")


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    with pytest.raises(StorageError, match=r"No folder can be made at /proc/nope/x\."):
        storage.ensure_writable("/proc/nope/x")
