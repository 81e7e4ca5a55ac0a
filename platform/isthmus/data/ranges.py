"""Reading byte ranges of one file, from several threads, over stores that fail now and then."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from isthmus import storage
from isthmus.errors import StorageError

_ATTEMPTS = 5


class Retries:
    """How often reads of this process were tried again."""

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def __int__(self) -> int:
        return self._count


retries = Retries()


class RangeReader:
    """One file. A read that fails or comes back short is tried again at the same offset on a fresh handle.

    The position is part of each request, never a state of a stream: a retry cannot skip or repeat bytes.

    Attributes:
        size: bytes; less than at first once a read has found the file cut.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._free: list[pa.NativeFile] = []
        self.size: int = self._persist(lambda handle: handle.size(), "opened")

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``.

        Raises:
            StorageError: the file is shorter, or the store failed %d times in a row.
        """
        self._check(offset, length)

        def exactly(handle: pa.NativeFile) -> bytes:
            if handle.size() > self.size:  # opened before the file was cut; or it has grown, and is another one
                raise OSError("the file has changed since it was indexed")
            self.size = handle.size()
            self._check(offset, length)
            data = storage.read_up_to(handle, offset, length)
            if len(data) != length:
                raise OSError("the answer was shorter than what was asked for; has the file changed?")
            return data

        data: bytes = self._persist(exactly, f"read at {offset}")
        return data

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise StorageError(
                f"{self.url} has {self.size} bytes; {length} bytes at {offset} were asked for.",
                "The file has changed since it was indexed: index it again.",
            )

    def _persist(self, work: Callable[[pa.NativeFile], Any], what: str) -> Any:
        """``work`` of a handle, on fresh ones while it fails as stores do for a moment."""
        failed: StorageError | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                retries.add()
                self.close()  # what was open is as old as the handle that failed
                time.sleep(0.05 * 2**attempt * (1 + random.random()))  # noqa: S311  (jitter, no secret)
            try:
                handle = self._take()
                found = work(handle)
            except (OSError, pa.ArrowException) as error:
                reason = str(error).splitlines()[0].rstrip(".")
                problem = f"{self.url} could not be {what} after {_ATTEMPTS} attempts: {reason}."
                failed = StorageError(problem, "Check the store.")
            except StorageError as error:  # of opening, in words; what is not there or not allowed stays so
                if not isinstance(error.__cause__, (OSError, pa.ArrowException)) or isinstance(
                    error.__cause__, (FileNotFoundError, PermissionError)
                ):
                    raise
                failed = error
            else:
                with self._lock:
                    self._free.append(handle)
                return found
        assert failed is not None
        raise failed

    def close(self) -> None:
        """Give the handles back; a later read opens the file again."""
        with self._lock:
            handles, self._free = self._free, []
        for handle in handles:
            handle.close()

    def _take(self) -> pa.NativeFile:
        """A handle that no other thread reads through; one that failed does not come back."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return storage.open_input(self.url)


RangeReader.read.__doc__ = (RangeReader.read.__doc__ or "") % _ATTEMPTS


class Sequential:
    """A forward-only file object over :class:`RangeReader` that hashes every byte it passes.

    Gives an archive parser ``read``, ``tell`` and a forward ``seek``; bytes that are skipped are hashed too, so after
    :meth:`drain` ``digest`` is the sha256 of the whole file, from one pass.
    """

    def __init__(self, source: RangeReader, chunk: int = 4 << 20) -> None:
        self._source, self._chunk = source, chunk
        self._hash = hashlib.sha256()
        self._buffer, self._start, self._position = b"", 0, 0

    def read(self, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        parts = []
        while length > 0 and (piece := self._peek(length)):
            parts.append(piece)
            self._position += len(piece)
            length -= len(piece)
        return b"".join(parts)

    def seek(self, position: int) -> int:
        """Move forward; past the end stops at the end."""
        if position < self._position:
            raise OSError("this file is read forwards only")
        while self._position < position and (piece := self._peek(position - self._position)):
            self._position += len(piece)
        return self._position

    def tell(self) -> int:
        """Bytes passed."""
        return self._position

    def drain(self) -> bool:
        """Pass the rest of the file; True when it holds anything but zero bytes."""
        found = False
        while piece := self._peek(self._chunk):
            found = found or any(piece)
            self._position += len(piece)
        return found

    @property
    def digest(self) -> str:
        """sha256 of the bytes fetched; the whole file's after :meth:`drain`."""
        return self._hash.hexdigest()

    def _peek(self, length: int) -> bytes:
        within = self._position - self._start
        if within >= len(self._buffer):
            self._start += len(self._buffer)
            want = min(self._chunk, self._source.size - self._start)
            self._buffer = self._source.read(self._start, want) if want > 0 else b""
            self._hash.update(self._buffer)
            within = 0
        return self._buffer[within : within + length]


class _Handles:
    """Open readers of this process, the least recently used closed first."""

    def __init__(self, limit: int = 64) -> None:
        self._get = functools.lru_cache(maxsize=limit)(lambda url, _version, _pid: RangeReader(url))

    def __call__(self, url: str, version: str = "") -> RangeReader:
        return self._get(url, version, os.getpid())

    def forget(self) -> None:
        """Let all handles go, so that files rewritten by this process are seen."""
        self._get.cache_clear()


open_range = _Handles()
"""``open_range(url, version)``: the process's shared :class:`RangeReader` of a file; another version (the digest that
a manifest gives) is opened anew."""
