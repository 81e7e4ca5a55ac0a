"""Bytes at a URL, the same way for a local folder, S3 and every other store that fsspec speaks to.

A URL is a plain path, ``file://``, ``s3://bucket/key`` or another scheme of fsspec. S3 takes its endpoint, keys and
region from the usual variables (``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``) or from the machine's role. All of S3 goes through
Arrow's own client, which retries throttled requests and cut bodies; other schemes go through fsspec.

Every function raises :class:`~isthmus.errors.StorageError` with the URL and the mend.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from isthmus.errors import IsthmusError, StorageError, nearest

T = TypeVar("T")

_PIECE = 8 << 20
_UNREAD = b"\x5a"  # rare as the last byte of a picture, a text or padding

_S3_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
)


def is_local(url: str) -> bool:
    """Whether ``url`` is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path behind a local URL."""
    if not is_local(url):
        raise StorageError(f"{url} is no local path.", "Give a folder of this machine here.")
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` behind it, separated by single slashes. A part that is a whole URL or path replaces it."""
    for part in parts:
        url = part if "://" in part or part.startswith("/") else f"{url.rstrip('/')}/{part}"
    return url


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    return _info(url).type != pafs.FileType.NotFound


def size(url: str) -> int:
    """Bytes of a file."""
    info = _info(url)
    if info.type != pafs.FileType.File:
        raise _missing(url)
    return int(info.size)


def read_bytes(url: str) -> bytes:
    """The whole file."""
    with open_input(url) as source, _translated(url):
        return bytes(source.read())


def read_range(url: str, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``; a shorter answer than asked for is an error, never returned."""
    with open_input(url) as source, _translated(url):
        data = read_up_to(source, offset, length)
    if len(data) != length:
        raise StorageError(f"{url} does not hold the {length} bytes asked for at {offset}.", "Is it cut short?")
    return data


def read_up_to(source: pa.NativeFile, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``, or fewer, which says that the file has not so many; moves the file's position.

    Where an object has become shorter than it was when it was opened, Arrow's S3 client (25.0) says that it read all
    that was asked for, and leaves the end of the buffer as it was: whatever was in that memory before would be taken
    for data. So the last byte is set before; if it is the same afterwards, it is asked for once more by itself.
    """
    buffer = bytearray(length)
    buffer[-1:] = _UNREAD[:length]
    source.seek(offset)
    count = int(source.readinto(buffer))
    if count and count == length and buffer.endswith(_UNREAD):
        last = bytearray(1)
        source.seek(offset + length - 1)
        if source.readinto(last) != 1 or last != _UNREAD:  # S3 refuses a range that begins behind the end
            count -= 1
    return bytes(memoryview(buffer)[:count])


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file. A reader sees the old content or the new one, never a part: temporary name and rename on a
    local disk, one upload elsewhere."""
    if is_local(url):
        path = local_path(url)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        with _translated(url):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as sink:
                    sink.write(data)
                    sink.flush()
                    os.fsync(sink.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return
    filesystem, path_text = resolve(url)
    with _translated(url), filesystem.open_output_stream(path_text) as sink:
        sink.write(data)


def move_file(path: Path, url: str) -> None:
    """Bring a file of this machine to ``url``; it is gone from ``path`` afterwards. To a local folder it is renamed, so
    it must lie on the same disk; elsewhere it goes up piece by piece, and a reader that meets an upload which broke off
    knows it by its size."""
    if is_local(url):
        with _translated(url):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(local_path(url))
        return
    filesystem, path_text = resolve(url)
    with _translated(url), path.open("rb") as source, filesystem.open_output_stream(path_text) as sink:
        shutil.copyfileobj(source, sink, _PIECE)
    path.unlink()


def list_files(url: str, suffixes: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """(URL, bytes) of every file below ``url``, sorted by URL; ``suffixes`` such as ``(".tar",)`` select.

    Hidden files (a name that starts with a dot) are left out.
    """
    filesystem, path = resolve(url)
    with _translated(url):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise _missing(url)
        if info.type == pafs.FileType.File:
            found = [info]
        else:
            found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    prefix = url.rstrip("/")
    out = []
    for item in found:
        name = PurePosixPath(item.path).name
        if item.type != pafs.FileType.File or name.startswith(".") or not (not suffixes or name.endswith(suffixes)):
            continue
        # without the leading slash, which some stores add to the paths that they list
        relative = item.path.strip("/")[len(path.strip("/")) :].lstrip("/")
        out.append((f"{prefix}/{relative}" if relative else prefix, int(item.size)))
    return sorted(out)


def delete(url: str) -> None:
    """Remove a file, or a folder with all that is in it. Nothing there is no error."""
    filesystem, path = resolve(url)
    with _translated(url):
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.File:
            filesystem.delete_file(path)
        elif kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)


def make_dirs(url: str) -> None:
    """The folder and its parents. Object stores have none, so nothing happens there."""
    if is_local(url):
        with _translated(url):
            local_path(url).mkdir(parents=True, exist_ok=True)


def open_input(url: str) -> pa.NativeFile:
    """A random-access file, for one thread at a time (:func:`read_up_to`)."""
    filesystem, path = resolve(url)
    with _translated(url):
        return filesystem.open_input_file(path)


def ensure_readable(url: str) -> None:
    """Raise now, with the reason, if ``url`` cannot be read or is not there."""
    if _info(url).type == pafs.FileType.NotFound:
        raise _missing(url)


def ensure_writable(url: str) -> None:
    """Raise now, with the reason, if nothing can be written below ``url``. Writes one tiny file and removes it."""
    probe = join(url, f".isthmus-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise StorageError(f"No folder can be made at {url}.", "Choose another folder.") from error
        raise


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """The Arrow file system of ``url`` and the path inside it."""
    if is_local(url):
        return pafs.LocalFileSystem(), str(local_path(url).absolute())
    scheme, _, rest = url.partition("://")
    if scheme in ("s3", "s3a"):
        if not rest.strip("/"):
            raise StorageError(f"{url} names no bucket.", "Write s3://BUCKET/FOLDER.")
        return _s3(tuple(os.environ.get(name) for name in _S3_VARIABLES), os.getpid()), rest.rstrip("/")
    if scheme in ("http", "https"):  # the one family whose paths are the whole URL
        return _fsspec(scheme), url
    return _fsspec(scheme), rest.rstrip("/")


@functools.lru_cache(maxsize=8)
def _s3(variables: tuple[str | None, ...], _process: int) -> pafs.S3FileSystem:
    """One client per environment and process: connections are reused, a changed key is noticed."""
    env = dict(zip(_S3_VARIABLES, variables, strict=True))
    options: dict[str, object] = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=4),
        "connect_timeout": 10,
        "request_timeout": 60,
        # a put that is not told otherwise is sent as parts: one request for a small file
        "background_writes": False,
    }
    if endpoint := env["AWS_ENDPOINT_URL_S3"] or env["AWS_ENDPOINT_URL"]:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if env["AWS_ACCESS_KEY_ID"] and env["AWS_SECRET_ACCESS_KEY"]:
        options |= {
            "access_key": env["AWS_ACCESS_KEY_ID"],
            "secret_key": env["AWS_SECRET_ACCESS_KEY"],
            "session_token": env["AWS_SESSION_TOKEN"],
        }
    region = env["AWS_REGION"] or env["AWS_DEFAULT_REGION"]
    if region or endpoint:  # a store of one's own has no regions; without this Arrow asks the cloud for it
        options["region"] = region or "us-east-1"
    return pafs.S3FileSystem(**options)


_fsspec_lock = threading.Lock()


@functools.lru_cache(maxsize=16)
def _fsspec(scheme: str) -> pafs.FileSystem:
    import fsspec

    # Listings are not remembered: a folder that is indexed again has changed. A web address that was allowed must not
    # lead to one that was not.
    options = {"allow_redirects": False} if scheme in ("http", "https") else {}
    try:
        with _fsspec_lock:
            filesystem = fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        known = sorted({"s3", "file", "gs", "abfs", "hdfs", *fsspec.available_protocols()})
        hint = "" if scheme in known else nearest(scheme, known)
        raise StorageError(
            f"The URL scheme '{scheme}://' cannot be opened: {error}.{hint}",
            "Use a local path or s3://, or install the fsspec package of that store.",
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


def _info(url: str) -> pafs.FileInfo:
    filesystem, path = resolve(url)
    with _translated(url):
        return filesystem.get_file_info(path)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except IsthmusError:
        raise
    except FileNotFoundError as error:
        raise _missing(url) from error
    except PermissionError as error:
        raise StorageError(f"No permission to read or write {url}.", "Check the folder's owner or the keys.") from error
    except (OSError, pa.ArrowException) as error:
        raise _explain(url, error) from error


_CAUSES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "The bucket of {url} does not exist.", "Create it or correct its name."),
    (
        ("INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId", "INVALID_CLIENT_TOKEN_ID"),
        "The store does not know the access key used for {url}.",
        "Correct AWS_ACCESS_KEY_ID.",
    ),
    (
        ("SIGNATURE_DOES_NOT_MATCH", "SignatureDoesNotMatch"),
        "The secret key used for {url} is wrong.",
        "Correct AWS_SECRET_ACCESS_KEY.",
    ),
    (
        ("ACCESS_DENIED", "AccessDenied", "HTTP status 403", "MISSING_AUTHENTICATION_TOKEN"),
        "Access to {url} is denied.",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to keys that may use this bucket.",
    ),
    (
        ("NETWORK_CONNECTION", "curlCode", "Couldn't connect", "Could not resolve"),
        "The store of {url} cannot be reached.",
        "Check AWS_ENDPOINT_URL and that the server runs.",
    ),
)


def _explain(url: str, error: BaseException) -> StorageError:
    text = str(error)
    if "ACCESS_DENIED" in text and not is_local(url):
        text = f"{_listing_error(url)} {text}"
    for marks, problem, mend in _CAUSES:
        if any(mark in text for mark in marks):
            return StorageError(problem.format(url=url), mend)
    return StorageError(f"{url} cannot be used: {text.strip().splitlines()[0] if text else type(error).__name__}.")


def _listing_error(url: str) -> str:
    """What the store says when the bucket is listed: answers to HEAD requests have no body that names the cause."""
    filesystem, path = resolve(url)
    try:
        filesystem.get_file_info(pafs.FileSelector(path.partition("/")[0]))
    except (OSError, pa.ArrowException) as error:
        return str(error)
    return ""


def _missing(url: str) -> StorageError:
    if url.startswith(("s3://", "s3a://")):
        filesystem, path = resolve(url)
        bucket = path.partition("/")[0]
        if _quietly(lambda: filesystem.get_file_info(bucket).type, None) == pafs.FileType.NotFound:
            return StorageError(f"The bucket '{bucket}' of {url} does not exist.", "Create it or correct its name.")
    head, _, name = url.rstrip("/").rpartition("/")
    hint = _quietly(lambda: nearest(name, _names(head)), "") if head else ""
    return StorageError(f"There is nothing at {url}.{hint}", "Check the path.")


def _names(url: str) -> list[str]:
    filesystem, path = resolve(url)
    return [PurePosixPath(item.path).name for item in filesystem.get_file_info(pafs.FileSelector(path))]


def _quietly(call: Callable[[], T], otherwise: T) -> T:
    """``call()``; ``otherwise`` when it fails: a hint must not hide the error it belongs to."""
    try:
        return call()
    except (OSError, IsthmusError, pa.ArrowException):
        return otherwise
