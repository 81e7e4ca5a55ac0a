"""Archives are verified, cached, read in one pass, and never lead out of their folder."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from isthmus import packages
from isthmus.packages import PackageError, download, extract, members, read

FILES = {"usr/share/doc/copyright": b"free", "usr/share/pics/a.png": b"A" * 1000, "usr/share/pics/b.txt": b"a frog"}


def tar_bytes(files: dict[str, bytes], mode: str = "w:xz", prefix: str = "./") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(prefix + "link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return buffer.getvalue()


def deb_bytes(files: dict[str, bytes], data_name: str = "data.tar.xz") -> bytes:
    """An ar archive as dpkg writes it, with an odd-sized member before the data to exercise the padding."""
    out = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n\n"), ("control.tar.xz", b"odd"), (data_name, tar_bytes(files))):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
    return buffer.getvalue()


ARCHIVES = {"a.deb": deb_bytes, "a.tgz": lambda f: tar_bytes(f, "w:gz"), "a.whl": zip_bytes}


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_kind_of_archive_reads_the_same_and_leaves_links_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name](FILES))
    assert {member: file.read() for member, file in members(path)} == FILES
    written = extract(path, tmp_path / "out", prefix="usr/share/pics/")
    assert {member: p.read_bytes() for member, p in written.items()} == {k: v for k, v in FILES.items() if "pics" in k}
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["a.png", "b.txt"]
    assert read(path, ["usr/share/pics/b.txt"]) == {"usr/share/pics/b.txt": b"a frog"}


def test_reading_stops_once_everything_asked_for_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"first": b"1", "second": b"2" * 4_000_000}, "w")[:1_000_000])
    assert read(path, ["first"]) == {"first": b"1"}
    with pytest.raises(PackageError, match="not a readable archive"):
        read(path, ["third"])


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_that_lead_out_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "box" / "a"
    path.parent.mkdir()
    path.write_bytes(tar_bytes({name: b"x"}, "w", prefix="") if kind == "tar" else zip_bytes({name: b"x"}))
    with pytest.raises(PackageError, match="leads out"):
        extract(path, tmp_path / "box" / "out")
    assert not list(tmp_path.rglob("evil"))


def test_missing_member_and_broken_archive_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb_bytes(FILES))
    with pytest.raises(PackageError, match=r"a\.deb has no member 'usr/nothing'"):
        extract(path, tmp_path / "out", members=["usr/nothing"])
    path.write_bytes(deb_bytes(FILES, data_name="other.tar"))
    with pytest.raises(PackageError, match="no data member"):
        list(members(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(PackageError, match="not a readable archive"):
        list(members(path))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A registry client that always serves the same bytes, and a log of how often it was asked."""
    calls: list[str] = []

    def serve(name: str, version: str, scratch: Path) -> Path:
        calls.append(f"{name} {version}")
        path = scratch / f"{name}.tgz"
        path.write_bytes(b"bytes")
        return path

    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(packages._FETCH, "npm", serve)
    return calls


def test_download_verifies_and_asks_once(client: list[str], tmp_path: Path) -> None:
    digest = hashlib.sha256(b"bytes").hexdigest()
    path = download("npm", "thing", "1.0", digest)
    assert path.read_bytes() == b"bytes" and (tmp_path / "cache") in path.parents
    assert download("npm", "thing", "1.0", digest) == path
    assert client == ["thing 1.0"]


def test_a_damaged_cache_is_fetched_again(client: list[str]) -> None:
    digest = hashlib.sha256(b"bytes").hexdigest()
    download("npm", "thing", "1.0", digest).write_bytes(b"damaged")
    assert download("npm", "thing", "1.0", digest).read_bytes() == b"bytes"
    assert len(client) == 2


def test_other_bytes_than_pinned_are_thrown_away(client: list[str], tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="expected " + "0" * 64):
        download("npm", "thing", "1.0", "0" * 64)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize(("kind", "client_name"), [("npm", "npm"), ("debian", "apt-get"), ("pypi", "pip")])
def test_a_missing_client_is_named(
    kind: packages.Kind, client_name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PackageError, match=f"comes through {client_name}, which is not on this machine"):
        download(kind, "thing", "1.0", "0" * 64, cache_dir=tmp_path)


def test_a_failing_client_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho noise >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(packages.shutil, "which", lambda _: str(script))
    with pytest.raises(PackageError, match=r"npm could not fetch thing 1\.0: npm error code ENOTFOUND\."):
        download("npm", "thing", "1.0", "0" * 64, cache_dir=tmp_path / "cache")


def test_unknown_kind_suggests_the_nearest() -> None:
    with pytest.raises(PackageError, match="Did you mean 'debian'"):
        download("debain", "thing", "1.0", "0" * 64)  # type: ignore[arg-type]
