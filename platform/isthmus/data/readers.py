"""Samples by manifest row: byte ranges of tars, row groups of Parquet files.

Rows are asked for by number and answered one for one, in the order asked: a sample, or a :class:`Failure` that says
where and why. Nothing is skipped.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.captions import as_captions, parse_captions, parse_side
from isthmus.data.manifest import Manifest
from isthmus.data.ranges import RangeReader, open_range
from isthmus.data.records import URI, VIDEO_KINDS
from isthmus.data.tables import parquet_columns
from isthmus.data.transforms import MAX_BYTES
from isthmus.data.uris import image_url
from isthmus.errors import IsthmusError, StorageError

_WINDOW = 256  # rows planned together; bounds the memory of a pass over the whole set
_GAP = 64 << 10  # two ranges closer than this are cheaper as one request
_MOST = 8 << 20  # bytes of one request
_REQUESTS = 8  # requests under way at once


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: encoded image or clip, captions (perhaps none) and the remaining fields of its JSON.

    Attributes:
        kind: ending of the image's or the clip's name, where it has one.
        sound: bytes of its sound file, where that was asked for and there is one.
    """

    id: int
    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    sound: bytes | None = None


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read or decoded.

    Attributes:
        id, key: which one.
        shard: name of its shard.
        offset: byte offset of the image in the shard (Parquet: the row).
        reason: one sentence.
        digest: sha256 of the image bytes, "" where they could not be read.
    """

    id: int
    key: str
    shard: str
    offset: int
    reason: str
    digest: str = ""


def failure_of(manifest: Manifest, row: int, reason: str, data: bytes = b"") -> Failure:
    """The :class:`Failure` of a manifest row."""
    record = _records(manifest, [row])[0]
    offset = record["image_offset"] if record["row"] < 0 else record["row"]
    digest = hashlib.sha256(data).hexdigest() if data else ""
    return Failure(record["id"], record["key"], manifest.shards[record["shard"]].name, offset, reason, digest)


def read_rows(
    manifest: Manifest, rows: Iterable[int], head: int | None = None, *, sounds: bool = False
) -> Iterator[RawSample | Failure]:
    """The samples of ``rows`` (manifest row numbers), one for one and in that order.

    ``head`` asks for no more than so many bytes of each image, as far as its shard allows (Parquet files hold them in
    compressed pages); ``sounds`` asks for sound files too. An image or sound larger than
    :data:`~isthmus.data.transforms.MAX_BYTES` is a failure and is not fetched.

    Neighbouring ranges are fetched as one request and several requests run at once; a failing request is repeated at
    its offset on a fresh connection.
    """
    waiting = iter(rows)
    while window := [int(row) for row in islice(waiting, _WINDOW)]:
        yield from _read_window(manifest, window, head, sounds)


def _read_window(manifest: Manifest, rows: Sequence[int], head: int | None, sounds: bool) -> list[RawSample | Failure]:
    records = _records(manifest, rows)
    if not sounds:
        records = [record | {"audio_length": None} for record in records]
    pieces = _fetch(manifest, records, head)
    make = functools.partial(_sample, manifest, pieces, head)
    if any(record["image_ext"] == URI for record in records):
        return list(_pool(os.getpid()).map(make, rows, records))
    return [make(row, record) for row, record in zip(rows, records, strict=True)]


def _records(manifest: Manifest, rows: Sequence[int]) -> list[dict[str, Any]]:
    return manifest.take(rows).to_pylist()


Piece = tuple[int, int, int]
"""(shard number, offset, length)"""


def _piece(record: dict[str, Any], name: str, head: int | None) -> Piece:
    length = record[f"{name}_length"]
    return record["shard"], record[f"{name}_offset"], min(length, head) if name == "image" and head else length


def _length(record: dict[str, Any], name: str) -> int:
    """Bytes of a member, -1 where there is none; manifests of earlier versions know of no sounds."""
    length = record.get(f"{name}_length")
    return -1 if length is None else int(length)


def _too_large(record: dict[str, Any]) -> str:
    """Why a row is not read, or nothing."""
    for name, what in (("image", "image"), ("audio", "sound")):
        if _length(record, name) > MAX_BYTES:
            what = "clip" if name == "image" and record["image_ext"] in VIDEO_KINDS else what
            return f"the {what} of {record[f'{name}_length']} bytes is larger than the limit of {MAX_BYTES}"
    return ""


def _fetch(manifest: Manifest, records: Sequence[dict[str, Any]], head: int | None) -> dict[Piece, bytes | str]:
    """Every byte range that the records name; a text instead of bytes says why one could not be read."""
    wanted: set[Piece] = set()
    for record in records:
        if record["row"] < 0 and not _too_large(record):
            there = (name for name in ("image", "text", "meta", "audio") if _length(record, name) >= 0)
            wanted |= {_piece(record, name, head) for name in there}
    spans = _coalesce(sorted(wanted))
    found: dict[Piece, bytes | str] = {}
    if len(spans) > 1 and not storage.is_local(manifest.root):
        answers = list(_pool(os.getpid()).map(functools.partial(_read_span, manifest), spans))
    else:
        answers = [_read_span(manifest, span) for span in spans]
    for answer in answers:
        found.update(answer)
    return found


def _coalesce(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Sorted pieces, grouped into spans that are read with one request each."""
    spans: list[list[Piece]] = []
    for piece in pieces:
        if spans:
            shard, start, _ = spans[-1][0]
            end = max(offset + length for _, offset, length in spans[-1][-2:])
            if piece[0] == shard and piece[1] - end <= _GAP and piece[1] + piece[2] - start <= _MOST:
                spans[-1].append(piece)
                continue
        spans.append([piece])
    return spans


def _read_span(manifest: Manifest, span: Sequence[Piece]) -> dict[Piece, bytes | str]:
    shard, start = span[0][:2]
    end = max(offset + length for _, offset, length in span)
    try:
        file = open_range(manifest.url(shard), manifest.shards[shard].digest)
    except IsthmusError as error:
        return dict.fromkeys(span, str(error))
    # A file that was cut since still gives what lies before the cut.
    there = [piece for piece in span if piece[1] + piece[2] <= file.size]
    if len(there) < len(span):
        gone = dict.fromkeys(span, f"{file.url} has {file.size} bytes: it has changed, index it again.")
        return gone | (_read_span(manifest, there) if there else {})
    try:
        data = file.read(start, end - start)
    except IsthmusError as error:
        return _read_span(manifest, span) if file.size < end else dict.fromkeys(span, str(error))
    return {piece: data[piece[1] - start : piece[1] - start + piece[2]] for piece in span}


def _sample(
    manifest: Manifest, pieces: dict[Piece, bytes | str], head: int | None, row: int, record: dict[str, Any]
) -> RawSample | Failure:
    if reason := _too_large(record):
        return failure_of(manifest, row, reason)
    if record["row"] >= 0:
        return _parquet_sample(manifest, row, record, head)

    def piece(name: str) -> bytes | str:
        return pieces[_piece(record, name, head)]

    image = piece("image")
    if isinstance(image, str):
        return failure_of(manifest, row, image)
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = {}
    try:
        if record["text_length"] >= 0:
            captions, meta = parse_captions(_bytes(piece("text")), record["text_ext"])
        if record["meta_length"] >= 0 and record["text_ext"] != "json":
            meta = parse_side(_bytes(piece("meta")))
        sound = _bytes(piece("audio")) if _length(record, "audio") >= 0 else None
    except ValueError as error:
        return failure_of(manifest, row, str(error), image)
    return RawSample(record["id"], record["key"], image, captions, meta, record["image_ext"], sound)


def _bytes(piece: bytes | str) -> bytes:
    if isinstance(piece, str):
        raise ValueError(piece)
    return piece


@functools.lru_cache(maxsize=1)
def _pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="ranges")


# ------------------------------------------------------------------------------------------------ parquet


class _RowGroups:
    """Row groups of this process, the least recently used dropped above a number of bytes."""

    def __init__(self, most: int = 256 << 20) -> None:
        self._most, self._held, self._lock = most, 0, threading.Lock()
        self._tables: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self._files: dict[tuple[str, str], tuple[pq.ParquetFile, np.ndarray]] = {}

    def row(self, url: str, version: str, row: int) -> dict[str, Any]:
        """One row of a Parquet shard as a dict with ``image`` (bytes or the file's URI), ``captions`` and ``meta``.

        ``version`` is the digest of the file that is meant: another one is opened anew.
        """
        with self._lock:
            file, starts = self._file(url, version)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            table = self._table(url, version, file, group)
        columns = parquet_columns(table.schema, url)
        if row - int(starts[group]) >= len(table):
            raise StorageError(f"{url} has no row {row}.", "The file has changed since it was indexed: index it again.")
        values = table.slice(row - int(starts[group]), 1).to_pylist()[0]
        data = values.pop(columns.image)
        captions = as_captions(values.pop(columns.caption)) if columns.caption else ()
        return {"image": data["bytes"] if isinstance(data, dict) else data, "captions": captions, "meta": values}

    def _file(self, url: str, version: str) -> tuple[pq.ParquetFile, np.ndarray]:
        if (url, version) not in self._files:
            file = pq.ParquetFile(storage.open_input(url))
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._files[url, version] = (file, np.concatenate([[0], np.cumsum(counts)[:-1]]))
        return self._files[url, version]

    def _table(self, url: str, version: str, file: pq.ParquetFile, group: int) -> pa.Table:
        key = (url, version, group)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = file.read_row_group(group)
        self._tables[key] = table
        self._held += table.nbytes
        while self._held > self._most and len(self._tables) > 1:
            self._held -= self._tables.popitem(last=False)[1].nbytes
        return table


_row_groups = _RowGroups()


def _parquet_sample(manifest: Manifest, row: int, record: dict[str, Any], head: int | None) -> RawSample | Failure:
    url, version = manifest.url(record["shard"]), manifest.shards[record["shard"]].digest
    try:
        found = _row_groups.row(url, version, record["row"])
        if not found["image"]:
            return failure_of(manifest, row, "the image is empty")
        image = found["image"]
        if record["image_ext"] == URI:
            image = _image_file(image_url(image, url, manifest.places), record["image_length"], head)
    except (IsthmusError, ValueError, OSError, pa.ArrowException) as error:
        return failure_of(manifest, row, str(error))
    return RawSample(record["id"], record["key"], image, found["captions"], found["meta"])


def _image_file(url: str, length: int, head: int | None) -> bytes:
    file = RangeReader(url)
    try:
        if file.size != length:
            raise ValueError(f"{url} has {file.size} bytes, {length} when it was indexed; index again")
        return file.read(0, min(length, head) if head else length)
    finally:
        file.close()
