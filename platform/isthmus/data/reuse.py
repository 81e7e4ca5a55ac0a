"""What the last index of a folder knows, so that the next one reads only what is new or has changed.

``manifest.stamps.json`` beside the manifest notes for every shard what its store says of its state: the ETag of an
object, times and inode of a local file. A shard of the same size and stamp keeps its rows and faults. The notes count
only with the very manifest they were written with, and only for the same rules: whatever is in doubt is read again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from isthmus import storage
from isthmus.data.listing import HEADER_FILE, TABLE_FILE, Found
from isthmus.data.pages import PAGES_FILE, Pages
from isthmus.data.records import HEARD_SCHEMA, SCHEMA, Problem, Scan, schema_of
from isthmus.errors import IsthmusError

STAMPS_FILE = "manifest.stamps.json"
SCAN_RULES = 2
"""Raise it with every change of what a scan finds in the same bytes: rows of other rules are not kept."""

SETTLED_S = 2.0
"""A local file that changed later than this before the index began gets no stamp: a file system's clock is coarse, and
a second change within one tick would leave the same times."""

_ETAGS = ("ETag", "etag", "md5Hash", "content_md5")
_LOOKUPS = 16  # files asked for at once


@dataclass(frozen=True)
class Part:
    """One shard of an index: its rows with the columns of :func:`schema_of` (``shard`` null), and its faults."""

    name: str
    size: int
    digest: str
    table: pa.Table
    problems: tuple[Problem, ...]
    final: bool
    passed_over: bool = False

    @classmethod
    def of(cls, scan: Scan) -> Part:
        """The finished form of a scan."""
        heard = any(sample.get("audio_length") is not None for sample in scan.samples)
        table = pa.Table.from_pylist(scan.samples, schema=HEARD_SCHEMA if heard else SCHEMA)
        return cls(
            scan.name, scan.size, scan.digest, table, tuple(scan.problems), scan.final, passed_over=scan.passed_over
        )


def stamps_of(files: Sequence[Found]) -> dict[str, str]:
    """A text for each file, by name, that changes with its content; "" where the store gives none to be relied on."""
    now = time.time()
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = pool.map(lambda file: _stamp(file.url, now), files)
        return {file.name: stamp for file, stamp in zip(files, found, strict=True)}


def _stamp(url: str, now: float) -> str:
    try:
        if storage.is_local(url):
            facts = storage.local_path(url).stat()
            # The change time too: a file can be rewritten and be given its old modification time.
            settled = max(facts.st_mtime, facts.st_ctime) <= now - SETTLED_S
            return f"{facts.st_ino}-{facts.st_mtime_ns}-{facts.st_ctime_ns}" if settled else ""
        filesystem, path = storage.resolve(url)
        if isinstance(filesystem, pafs.PyFileSystem):
            known = filesystem.handler.fs.info(path)
        else:
            with filesystem.open_input_file(path) as source:
                known = dict(source.metadata() or {})
    except (OSError, pa.ArrowException, IsthmusError):
        return ""  # the scan will meet the same fault and say it
    return next((str(known[name]) for name in _ETAGS if known.get(name)), "")


@dataclass(frozen=True)
class Before:
    """The last index of a folder.

    Attributes:
        shards: its entries of ``manifest.json``, by name.
        starts: number of each shard's first row.
        faults: by shard.
        stamps: by shard, "" where there was none.
        slice: (number of the first row, rows) -> those rows.
    """

    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[Problem]] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)
    slice: Callable[[int, int], pa.Table] = SCHEMA.empty_table().slice

    def knows(self, file: Found, stamp: str) -> bool:
        """Whether a file is as the last index found it."""
        shard = self.shards.get(file.name)
        return shard is not None and stamp != "" and (shard["size"], self.stamps.get(file.name)) == (file.size, stamp)

    def part(self, name: str) -> Part | None:
        """What the last index found in a file that it knows, or None where that can no longer be read."""
        shard = self.shards[name]
        try:
            rows = self.slice(self.starts[name], shard["samples"])
            rows = rows.cast(schema_of(rows.column_names))
        except IsthmusError:
            return None
        return Part(name, shard["size"], shard["digest"], rows, tuple(self.faults.get(name, ())), final=True)

    @classmethod
    def load(cls, root: str, rules: dict[str, Any]) -> Before:
        """The index in ``root``, if it was made by the same ``rules`` and is whole; else an empty one."""
        try:
            notes = json.loads(storage.read_bytes(storage.join(root, STAMPS_FILE)))
            header_bytes = storage.read_bytes(storage.join(root, HEADER_FILE))
            header = json.loads(header_bytes)
            pages = header.get("pages")
            table_bytes = b"" if pages else storage.read_bytes(storage.join(root, TABLE_FILE))
            if notes["rules"] != _rules(rules) or notes["of"] != _digests(header_bytes, table_bytes):
                return cls()
            take = _slice_of(table_bytes) if not pages else _slice_of_pages(root, header)
            shards = header["shards"]
            starts = itertools.accumulate((shard["samples"] for shard in shards), initial=0)
            faults: dict[str, list[Problem]] = {}
            for problem in header["problems"]:
                faults.setdefault(problem["shard"], []).append(Problem(**problem))
            names = [shard["name"] for shard in shards]
            return cls(
                dict(zip(names, shards, strict=True)),
                dict(zip(names, starts, strict=False)),
                faults,
                notes["stamps"],
                take,
            )
        except (IsthmusError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
            return cls()


def _slice_of(table_bytes: bytes) -> Callable[[int, int], pa.Table]:
    table: pa.Table = pq.read_table(pa.BufferReader(table_bytes))
    return table.cast(schema_of(table.column_names)).slice


def _slice_of_pages(root: str, header: dict[str, Any]) -> Callable[[int, int], pa.Table]:
    """Pages name the digest of the manifest that they belong to, and each is checked as it is read."""
    pages = Pages(storage.join(root, PAGES_FILE), header["digest"], header["pages"])
    return lambda start, rows: pa.Table.from_batches(pages.batches(start, start + rows), pages.schema)


def save_stamps(root: str, stamps: dict[str, str], rules: dict[str, Any], header: bytes, table: bytes) -> None:
    """Note the stamps that belong to a manifest's two files. ``table`` is b"" where the rows are in pages as well."""
    notes = {"rules": _rules(rules), "of": _digests(header, table), "stamps": stamps}
    storage.write_bytes(storage.join(root, STAMPS_FILE), json.dumps(notes, indent=1).encode())


def _rules(rules: dict[str, Any]) -> dict[str, Any]:
    return {"scan": SCAN_RULES, **rules}


def _digests(header: bytes, table: bytes) -> list[str]:
    return [hashlib.sha256(data).hexdigest() for data in (header, table)]
