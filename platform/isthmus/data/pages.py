"""The paged form of a large manifest: its rows by number, without the rest of them.

``manifest.parquet`` is compressed in columns of 131,072 rows each, so a few rows out of many places cost far more than
they hold. ``manifest.pages`` has the same rows again in pages of :data:`PAGE_ROWS`, each of which is one read::

    page*      crc32 (seeded with the page's number), uncompressed size, and one Arrow record batch as one zstd frame
    index      uint32 length of each page
    end        JSON: digest of the manifest, samples, rows of a page, columns, length and crc32 of the index
    tail       length and crc32 of the end, and :data:`MAGIC`

The columns of :data:`DIFFERENCES` are stored as differences from the row before. A reader holds the index (16 bytes for
each 1,000 rows or so) and the pages that it used last, up to a number of bytes.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from isthmus.data.ranges import RangeReader
from isthmus.data.records import SCHEMA, schema_of
from isthmus.data.rows import integers
from isthmus.errors import DataError

PAGES_FILE = "manifest.pages"

PAGE_ROWS = 512
"""A multiple of :data:`isthmus.data.order.CHUNK`, so that each chunk of a batch is in one page."""

HELD_BYTES = 64 << 20
"""Uncompressed pages that a reader keeps. A span of the default shuffle pool needs about a third of it."""

DIFFERENCES = ("image_offset", "text_offset", "meta_offset", "row")
MAGIC = b"isthmus-pages-1\n"

_HEAD = struct.Struct("<II")
_TAIL = struct.Struct("<II16s")
_RUN = 64  # pages of one request of a pass over the whole
_GROUP = 256  # pages whose rows are taken together: bounds a look-up of very many rows
_READS = 8  # pages fetched at once


class PageWriter:
    """Writes rows as pages, in order.

    Args:
        path: a local file.
        page_rows: rows of each page but the last.
        schema: columns of the rows.
    """

    def __init__(self, path: Path, page_rows: int = PAGE_ROWS, schema: pa.Schema = SCHEMA) -> None:
        self._file, self._schema = path.open("wb"), schema
        self._page_rows, self._samples = page_rows, 0
        self._lengths: list[int] = []
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pages")

    def write(self, table: pa.Table) -> None:
        """Append rows with the columns of ``schema``. All but the last call give whole pages."""
        if self._samples % self._page_rows:
            raise ValueError("only the last page may be short")
        batch = _as_differences(table, self._page_rows)
        first = len(self._lengths)
        starts = range(0, len(table), self._page_rows)
        slices = (batch.slice(start, self._page_rows) for start in starts)
        for page in self._pool.map(_encoded, slices, range(first, first + len(starts))):
            self._file.write(page)
            self._lengths.append(len(page))
        self._samples += len(table)

    def finish(self, digest: str) -> int:
        """Append index and end, which name the ``digest`` of the manifest; the bytes of the whole file."""
        index = np.asarray(self._lengths, dtype="<u4").tobytes()
        end = json.dumps(
            {
                "digest": digest,
                "samples": self._samples,
                "page_rows": self._page_rows,
                "columns": {field.name: str(field.type) for field in self._schema},
                "index": [len(index), zlib.crc32(index)],
            }
        ).encode()
        self._file.write(index + end + _TAIL.pack(len(end), zlib.crc32(end), MAGIC))
        size = self._file.tell()
        self.close()
        return size

    def close(self) -> None:
        """Let file and threads go."""
        self._pool.shutdown()
        self._file.close()


class Pages:
    """Rows of a paged manifest by number. Safe to use from several threads, and picklable: it opens the file again.

    Attributes:
        url: the file.
        digest: of the manifest that it belongs to.
        page_rows: rows of each page but the last.
        schema: the columns.
    """

    def __init__(self, url: str, digest: str, facts: Mapping[str, Any], held_bytes: int = HELD_BYTES) -> None:
        """Open the paged form of a manifest.

        Args:
            url: the file.
            digest: of the manifest; the file must name the same one.
            facts: what ``manifest.json`` says of the file: ``bytes``, ``captioned``, ``repeated_images``.
            held_bytes: uncompressed pages to keep.

        Raises:
            DataError: cut short, damaged, or of another index.
            StorageError: the file is not there or cannot be read.
        """
        self.url, self.digest = url, digest
        self._facts, self._held = dict(facts), _Held(held_bytes)
        self._files: dict[int, RangeReader] = {}
        file = self._file()
        if file.size != facts["bytes"]:
            raise self._damaged(f"has {file.size} bytes, {facts['bytes']} when it was written")
        length, crc, magic = _TAIL.unpack(file.read(file.size - _TAIL.size, _TAIL.size))
        if magic != MAGIC or length > file.size - _TAIL.size:
            raise self._damaged("does not end as such a file does")
        at = file.size - _TAIL.size - length
        text = file.read(at, length)
        if zlib.crc32(text) != crc:
            raise self._damaged("has a damaged end")
        end = json.loads(text)
        if end["digest"] != digest:
            raise self._damaged(f"is of another index ({end['digest'][:12]}, not {digest[:12]})")
        length, crc = end["index"]
        index = file.read(at - length, length)
        if zlib.crc32(index) != crc:
            raise self._damaged("has a damaged list of pages")
        self.page_rows, self._samples = int(end["page_rows"]), int(end["samples"])
        self.schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in end["columns"].items()])
        self._starts = np.concatenate([[0], np.cumsum(np.frombuffer(index, "<u4"), dtype=np.int64)])

    def __reduce__(self) -> tuple[Any, ...]:
        return (Pages, (self.url, self.digest, self._facts, self._held.most))

    def __len__(self) -> int:
        return self._samples

    @property
    def captioned(self) -> int:
        """Samples that have a caption."""
        return int(self._facts["captioned"])

    @property
    def repeated_images(self) -> bool:
        """Whether two samples have the same image id."""
        return bool(self._facts["repeated_images"])

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are kept at present."""
        return self._held.bytes

    def take(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows ``numbers`` in that order, with ``columns`` or all of them.

        Raises:
            IndexError: a number outside of [0, len).
            DataError: a page is damaged.
        """
        wanted_N = np.asarray(numbers, dtype=np.int64)
        schema = self._schema_of(columns)
        if not len(wanted_N):
            return schema.empty_table()
        if wanted_N.min() < 0 or wanted_N.max() >= self._samples:
            raise IndexError(f"{self.url} has rows 0 to {self._samples - 1}.")
        order_N = np.argsort(wanted_N, kind="stable")
        page_N, within_N = np.divmod(wanted_N[order_N], self.page_rows)
        first_P = np.flatnonzero(np.diff(page_N, prepend=-1))
        last_P = np.append(first_P[1:], len(page_N))
        pieces: list[pa.RecordBatch] = []
        for start in range(0, len(first_P), _GROUP):
            group = slice(start, start + _GROUP)
            held = self._load(page_N[first_P[group]].tolist())
            for page, first, last in zip(held, first_P[group], last_P[group], strict=True):
                piece = page if columns is None else page.select(list(columns))
                pieces.append(piece.take(pa.array(within_N[first:last])))
        table = pa.Table.from_batches(pieces, schema).combine_chunks()
        back_N = np.empty_like(order_N)
        back_N[order_N] = np.arange(len(order_N))
        return table.take(pa.array(back_N))

    def batches(
        self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows ``start`` to ``stop`` - 1 in order, a page or less at a time, past what is kept."""
        stop = self._samples if stop is None else min(stop, self._samples)
        if stop <= start:
            return
        first, last = start // self.page_rows, -(-stop // self.page_rows)
        for begin in range(first, last, _RUN):
            for page, batch in zip(range(begin, last), self._run(begin, min(begin + _RUN, last)), strict=False):
                row = page * self.page_rows
                low, high = max(start - row, 0), min(stop - row, len(batch))
                some = batch.slice(low, high - low)
                yield some if columns is None else some.select(list(columns))

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in memory, with ``columns`` or all of them."""
        return pa.Table.from_batches(self.batches(columns=columns), self._schema_of(columns))

    def column(self, name: str) -> np.ndarray:
        """A whole column of integers, in memory, [len]; nulls are -1."""
        out = np.empty(self._samples, self.schema.field(name).type.to_pandas_dtype())
        at = 0
        for batch in self.batches(columns=[name]):
            out[at : at + len(batch)] = integers(batch[name])
            at += len(batch)
        return out

    def _file(self) -> RangeReader:
        """The open file of this process: clients of object stores do not survive a fork."""
        process = os.getpid()
        if process not in self._files:
            self._files = {process: RangeReader(self.url)}
        return self._files[process]

    def _load(self, pages: Sequence[int]) -> list[pa.RecordBatch]:
        """The pages, those that are not kept by several reads at once."""
        found = {page: batch for page in pages if (batch := self._held.get(page)) is not None}
        missing = [page for page in pages if page not in found]
        fetched = map(self._fetch, missing) if len(missing) < 2 else _threads(os.getpid()).map(self._fetch, missing)
        for page, (batch, size) in zip(missing, fetched, strict=True):
            found[page] = batch
            self._held.put(page, batch, size)
        return [found[page] for page in pages]

    def _fetch(self, page: int) -> tuple[pa.RecordBatch, int]:
        begin, end = int(self._starts[page]), int(self._starts[page + 1])
        return self._decoded(page, self._file().read(begin, end - begin))

    def _run(self, first: int, last: int) -> list[pa.RecordBatch]:
        """The pages ``first`` to ``last`` - 1, by one read."""
        at = self._starts[first : last + 1] - self._starts[first]
        data = memoryview(self._file().read(int(self._starts[first]), int(at[-1])))
        parts = [data[begin:end] for begin, end in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)]
        return [batch for batch, _ in _threads(os.getpid()).map(self._decoded, range(first, last), parts)]

    def _schema_of(self, columns: Sequence[str] | None) -> pa.Schema:
        return self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])

    def _decoded(self, page: int, data: bytes | memoryview) -> tuple[pa.RecordBatch, int]:
        """The rows of a page, and the bytes they take."""
        body = memoryview(data)[_HEAD.size :]
        crc, size = _HEAD.unpack_from(data)
        if zlib.crc32(body, page) != crc:
            raise self._damaged(f"is damaged between the bytes {self._starts[page]} and {self._starts[page + 1]}")
        batch = pa.ipc.read_record_batch(pa.decompress(body, decompressed_size=size, codec="zstd"), self.schema)
        for name in DIFFERENCES:
            column = self.schema.get_field_index(name)
            batch = batch.set_column(column, name, pa.array(np.cumsum(batch.column(column).to_numpy())))
        return batch, size + 8 * len(batch) * len(DIFFERENCES)

    def _damaged(self, what: str) -> DataError:
        root = self.url.removesuffix(f"/{PAGES_FILE}")
        return DataError(f"{self.url} {what}.", f"Run `isthmus data index {root}` again; it writes the file anew.")


class _Held:
    """Pages, the least recently used dropped above a number of bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._pages: OrderedDict[int, tuple[pa.RecordBatch, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, page: int) -> pa.RecordBatch | None:
        with self._lock:
            if page not in self._pages:
                return None
            self._pages.move_to_end(page)
            return self._pages[page][0]

    def put(self, page: int, batch: pa.RecordBatch, size: int) -> None:
        with self._lock:
            if page in self._pages:  # another thread was faster
                return
            self._pages[page] = (batch, size)
            self.bytes += size
            while self.bytes > self.most and len(self._pages) > 1:
                self.bytes -= self._pages.popitem(last=False)[1][1]


@functools.lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READS, thread_name_prefix="pages")


def _as_differences(table: pa.Table, page_rows: int) -> pa.RecordBatch:
    """One batch, in which each page of the columns :data:`DIFFERENCES` is a value and the steps from it on."""
    for name in DIFFERENCES:
        values = table[name].to_numpy()
        steps = np.diff(values, prepend=0)
        steps[::page_rows] = values[::page_rows]
        table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), pa.array(steps))
    schema = schema_of(table.column_names)
    batches = table.cast(schema).combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=schema)


def _encoded(batch: pa.RecordBatch, page: int) -> bytes:
    message = batch.serialize()
    body = pa.Codec("zstd", compression_level=1).compress(message, asbytes=True)
    return _HEAD.pack(zlib.crc32(body, page), message.size) + body
