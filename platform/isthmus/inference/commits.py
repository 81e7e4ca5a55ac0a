"""Exactly once: parts, commit records, and the books that must balance.

A job's folder holds

    job.json                       what this folder is the answer to, and the digest of that
    parts/part-000012.parquet      the rows of one deterministic chunk
    texts/part-000012.parquet      embedding jobs: one row per caption
    quarantine/part-000012.parquet the images of that chunk that could not be read, only where there are any
    commits/000012.json            written last: a chunk without this record was never done
    quarantine.parquet             all quarantined images, written when the books balance
    report.json                    likewise

Every file is written whole or not at all (``isthmus.storage.write_bytes``), the commit record after what it vouches
for. A process may therefore die between any two instructions: the next run finds a chunk either done or not done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.errors import DataError

SCHEMA_VERSION = 1
PARTS, QUARANTINE = "parts", "quarantine"
READERS = 16  # control files are small and far away: latency, not bandwidth

QUARANTINE_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("digest", pa.string()),
    ]
)


class Slices(Protocol):
    """A sequence of ids of which runs are asked for."""

    def __getitem__(self, rows: slice, /) -> Sequence[int] | np.ndarray: ...


@dataclass(frozen=True)
class Chunk:
    """Manifest rows ``start`` to ``stop`` (exclusive). ``index`` names the part."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Quarantined:
    """An image that gave no row, and why. ``digest`` is of its bytes, "" where none could be read."""

    id: int
    key: str
    shard: str
    offset: int
    reason: str
    digest: str = ""


@dataclass(frozen=True)
class Job:
    """What an output folder is the answer to. Equal facts give equal digests on any machine.

    Attributes:
        kind: ``caption`` or ``embed``.
        facts: everything that changes a row or the cut into chunks; throughput settings stay out.
    """

    kind: str
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest_of({"kind": self.kind, "facts": dict(self.facts)})


@dataclass(frozen=True)
class Commit:
    """A chunk's commit record.

    Attributes:
        rows, quarantined: how many of the chunk's images are in the part and in the quarantine.
        ids: digest over the part's ids in order.
        files: every file of the chunk, by path below the folder: [sha256, bytes].
        job: the job's digest.
    """

    index: int
    start: int
    stop: int
    rows: int
    quarantined: int
    ids: str
    files: dict[str, list[Any]]
    job: str
    schema: int = SCHEMA_VERSION


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ids_digest(ids: Iterable[int]) -> str:
    """sha256 over int64 ids in order."""
    digest = hashlib.sha256()
    for value in ids:
        digest.update(int(value).to_bytes(8, "little", signed=True))
    return digest.hexdigest()


def chunks(samples: int, size: int) -> list[Chunk]:
    """The rows 0 .. samples-1 cut into runs of ``size``; the same cut for the same two numbers."""
    return [Chunk(index, start, min(start + size, samples)) for index, start in enumerate(range(0, samples, size))]


class Ledger:
    """The books of one output folder.

    Args:
        out: folder or URL.
        job: what is to be done there.
    """

    def __init__(self, out: str, job: Job) -> None:
        self.out = out
        self.job = job

    def open(self) -> None:
        """Claims the folder for this job, or finds it claimed by the same one.

        Raises:
            DataError: the folder holds another job's output, or files without a job record.
            StorageError: the folder cannot be written.
        """
        storage.make_dirs(self.out)
        url = storage.join(self.out, "job.json")
        if not storage.exists(url):
            if any(name.endswith(".parquet") for name in self._names()):
                raise DataError(f"{self.out} holds other files and no job.json.", "Choose another 'out'.")
            record = {"kind": self.job.kind, "facts": dict(self.job.facts), "digest": self.job.digest}
            storage.write_bytes(url, json.dumps(record, indent=2, sort_keys=True).encode())
            return
        try:
            found = json.loads(storage.read_bytes(url))
        except ValueError as error:
            raise DataError(f"{url} is not valid JSON.", "Choose another 'out' or empty the folder.") from error
        if found.get("digest") != self.job.digest:
            raise DataError(
                f"{self.out} holds the output of another job ({self._differences(found)}).",
                "Give another 'out', or empty the folder to start anew.",
            )

    def commit(
        self,
        chunk: Chunk,
        table: pa.Table,
        quarantined: Sequence[Quarantined],
        extras: Mapping[str, pa.Table] | None = None,
    ) -> Commit:
        """Writes a chunk's part, its further tables, its quarantine and, last, its commit record.

        Args:
            table: one row per readable image, with its ``id``.
            quarantined: the other images of the chunk.
            extras: further tables by folder name.

        Raises:
            DataError: rows and quarantined images do not add up to the chunk.
        """
        ids = table["id"].to_pylist()
        if len(set(ids)) != len(ids) or len(ids) + len(quarantined) != len(chunk):
            raise DataError(
                f"Chunk {chunk.index} has {len(chunk)} images but {len(ids)} rows ({len(set(ids))} ids) and "
                f"{len(quarantined)} quarantined.",
                "This is a fault in the reader, not in the data: please report it.",
            )
        tables = {PARTS: table, **(extras or {})}
        if quarantined:
            tables[QUARANTINE] = quarantine_table(quarantined)
        files: dict[str, list[Any]] = {}
        for folder, content in tables.items():
            name, data = _part(folder, chunk.index), parquet_bytes(content)
            storage.write_bytes(storage.join(self.out, name), data)
            files[name] = [hashlib.sha256(data).hexdigest(), len(data)]
        record = Commit(
            index=chunk.index,
            start=chunk.start,
            stop=chunk.stop,
            rows=len(ids),
            quarantined=len(quarantined),
            ids=ids_digest(ids),
            files=files,
            job=self.job.digest,
        )
        storage.write_bytes(self._commit_url(chunk.index), json.dumps(record.__dict__, sort_keys=True).encode())
        return record

    def committed(self, plan: Sequence[Chunk]) -> dict[int, Commit]:
        """The commit records that are whole, of this job, fit ``plan`` and have their files beside them, by index."""
        wanted = {chunk.index: chunk for chunk in plan}
        root = f"{self.out.rstrip('/')}/"
        sizes = {url.removeprefix(root): size for url, size in storage.list_files(self.out)}
        urls = [root + name for name in sizes if name.startswith("commits/") and name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            records = [record for record in pool.map(_read_commit, urls) if record is not None]
        return {
            r.index: r
            for r in records
            if (chunk := wanted.get(r.index)) is not None
            and (r.start, r.stop, r.job) == (chunk.start, chunk.stop, self.job.digest)
            and all(sizes.get(name) == size for name, (_, size) in r.files.items())
        }

    def _names(self) -> list[str]:
        return [url for url, _ in storage.list_files(self.out)] if storage.exists(self.out) else []

    def revoke(self, index: int) -> None:
        """Deletes a commit record: the chunk counts as never done."""
        storage.delete(self._commit_url(index))

    def reconcile(self, plan: Sequence[Chunk], ids: Slices) -> tuple[int, list[Quarantined]]:
        """Reads every part back and balances it against the manifest.

        Args:
            plan: all chunks of the job.
            ids: the manifest's ids in row order; slices of them are asked for.

        Returns:
            (rows in parts, quarantined images in manifest order).

        Raises:
            DataError: a chunk is missing, damaged, or its ids are not exactly the manifest's. The commit records of
                damaged chunks are revoked, so that the next run does them again.
        """
        records = self.committed(plan)
        faults: dict[int, str] = {chunk.index: "no commit record" for chunk in plan if chunk.index not in records}
        rows, quarantined = 0, list[Quarantined]()

        def audit(chunk: Chunk) -> tuple[Chunk, list[Quarantined] | str]:
            return chunk, self._audit(records[chunk.index], ids[chunk.start : chunk.stop])

        with ThreadPoolExecutor(READERS) as pool:
            for chunk, found in pool.map(audit, [c for c in plan if c.index in records]):
                if isinstance(found, str):
                    faults[chunk.index] = found
                    self.revoke(chunk.index)
                else:
                    rows += len(chunk) - len(found)
                    quarantined += found
        if faults:
            index, reason = min(faults.items())
            raise DataError(
                f"The books of {self.out} do not balance: {len(faults)} of {len(plan)} chunks are missing or damaged "
                f"(chunk {index}: {reason}).",
                "Run the same command again; it redoes exactly these.",
            )
        return rows, quarantined

    def close(self, quarantined: Sequence[Quarantined], report: Mapping[str, Any]) -> None:
        """Writes ``quarantine.parquet`` and ``report.json`` once the books balance."""
        url = storage.join(self.out, "quarantine.parquet")
        storage.write_bytes(url, parquet_bytes(quarantine_table(quarantined)))
        storage.write_bytes(storage.join(self.out, "report.json"), json.dumps(dict(report), indent=2).encode())

    def _commit_url(self, index: int) -> str:
        return storage.join(self.out, "commits", f"{index:06d}.json")

    def _audit(self, record: Commit, expected: Sequence[int] | np.ndarray) -> list[Quarantined] | str:
        """The chunk's quarantined images, or what is wrong with it."""
        content: dict[str, pa.Table] = {}
        for name, (sha256, _) in record.files.items():
            data = storage.read_bytes(storage.join(self.out, name))
            if hashlib.sha256(data).hexdigest() != sha256:
                return f"the digest of {name} differs from its commit record"
            if name.startswith((PARTS, QUARANTINE)):
                columns = ["id"] if name.startswith(PARTS) else None
                content[name.partition("/")[0]] = pq.read_table(pa.BufferReader(data), columns=columns)
        ids = content[PARTS]["id"].to_pylist()
        aside = [Quarantined(**row) for row in content[QUARANTINE].to_pylist()] if record.quarantined else []
        if len(set(ids)) != len(ids) or ids_digest(ids) != record.ids:
            return "ids are doubled or differ from the commit record"
        if sorted([*ids, *(q.id for q in aside)]) != sorted(int(i) for i in expected):
            return "its ids are not the manifest's"
        return aside

    def _differences(self, found: Mapping[str, Any]) -> str:
        if found.get("kind") != self.job.kind:
            return f"kind is {found.get('kind')}, asked for {self.job.kind}"
        facts = found.get("facts") or {}
        keys = sorted(k for k in {*facts, *self.job.facts} if facts.get(k) != self.job.facts.get(k))
        return "; ".join(f"{k}: there {_short(facts.get(k))}, now {_short(self.job.facts.get(k))}" for k in keys)


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def quarantine_table(rows: Sequence[Quarantined]) -> pa.Table:
    """The quarantine's rows as a table; no rows give an empty one of the same schema."""
    return pa.Table.from_pylist([row.__dict__ for row in rows], schema=QUARANTINE_SCHEMA)


def _part(folder: str, index: int) -> str:
    return f"{folder}/part-{index:06d}.parquet"


def _read_commit(url: str) -> Commit | None:
    try:
        return Commit(**json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError):  # cut short, or by another version: the chunk is simply done again
        return None


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else repr(value)
