"""The manifest: what a data set holds, sample by sample, with byte offsets and digests.

``index`` scans the shards below a folder once and writes ``manifest.parquet`` (one row per sample) and
``manifest.json`` (schema version, digest, shards) beside them. Everything that reads data afterwards reads by the
manifest's offsets, so no sample can be lost or repeated on the way, and "the data" of a run is one digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.parallel import map_ordered
from isthmus.data.ranges import RangeReader, Sequential
from isthmus.data.scan import IMAGE_ID_COLUMN, SCHEMA, Problem, Scan, scan_shard
from isthmus.errors import DataError

VERSION = 1
TABLE_FILE, HEADER_FILE = "manifest.parquet", "manifest.json"


@dataclass(frozen=True)
class Shard:
    """A file of samples. ``name`` is relative to the manifest's folder, or a whole URL; ``size`` is in bytes."""

    name: str
    size: int
    samples: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """An indexed data set.

    Attributes:
        root: URL of the folder.
        digest: sha256 over the shards' names, sizes and digests and over the table; independent of where it lies.
        shards: in the order that the column ``shard`` counts.
        table: one row per sample, columns of :data:`isthmus.data.scan.SCHEMA`, ordered by (shard, offset).
    """

    root: str
    digest: str
    shards: tuple[Shard, ...]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """Sample ids, int64 [len]."""
        return self.table["id"].to_numpy()

    @property
    def names_images(self) -> bool:
        """Whether it was written with the images' ids. Older ones were not; their digest is the same."""
        return IMAGE_ID_COLUMN in self.table.column_names

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        """Id of each sample's image, int64 [len]: equal where the data says so, else the sample's own id."""
        if not self.names_images:
            return self.ids
        return pc.coalesce(self.table[IMAGE_ID_COLUMN], self.table["id"]).to_numpy()

    @functools.cached_property
    def image_bytes(self) -> np.ndarray:
        """Size of each encoded image, int64 [len]; 0 where the index could not tell."""
        return np.maximum(self.table["image_length"].to_numpy(), 0)

    @functools.cached_property
    def captioned(self) -> int:
        """Samples that have a caption."""
        texts = np.asarray(self.table["text_ext"].to_pandas() != "")
        return int(texts.sum())

    def url(self, shard: int) -> str:
        """The URL of shard number ``shard``."""
        return storage.join(self.root, self.shards[shard].name)

    @classmethod
    def load(cls, url: str, *, verify: bool = True) -> Manifest:
        """The manifest in the folder ``url``.

        Args:
            url: the folder that was indexed.
            verify: compare the shards' sizes with a listing, so that shards rewritten since are noticed here.

        Raises:
            DataError: not indexed, written by another version, damaged, or out of date.
            StorageError: the folder cannot be read.
        """
        header_url = storage.join(url, HEADER_FILE)
        if not storage.exists(header_url):
            storage.ensure_readable(url)
            raise DataError(f"{url} is not indexed ({HEADER_FILE} is missing).", f"Run `isthmus data index {url}`.")
        try:
            header = json.loads(storage.read_bytes(header_url))
            version = header["version"]
            shards = tuple(Shard(**shard) for shard in header["shards"])
            table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(url, TABLE_FILE))))
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(f"The manifest of {url} is damaged: {error}.", "Index the folder again.") from error
        if version != VERSION:
            raise DataError(f"The manifest of {url} has version {version}, not {VERSION}.", "Index the folder again.")
        manifest = cls(url, header["digest"], shards, table)
        if _digest(shards, table) != manifest.digest:
            raise DataError(
                f"{HEADER_FILE} and {TABLE_FILE} of {url} do not belong together.", "Index the folder again."
            )
        if verify:
            manifest._verify_sizes()
        return manifest

    def _verify_sizes(self) -> None:
        own = [shard for shard in self.shards if "://" not in shard.name and not shard.name.startswith("/")]
        there = {found[len(self.root.rstrip("/")) + 1 :]: size for found, size in storage.list_files(self.root)}
        for shard in own:
            if shard.name not in there:
                raise DataError(f"The shard {shard.name} of {self.root} is gone.", "Restore it or index again.")
            if there[shard.name] != shard.size:
                raise DataError(
                    f"The shard {shard.name} of {self.root} has {there[shard.name]} bytes, {shard.size} when indexed.",
                    "Index the folder again.",
                )


@dataclass(frozen=True)
class IndexReport:
    """What ``index`` found: usable samples, shards, the faults, and the manifest's digest."""

    samples: int
    shards: int
    problems: tuple[Problem, ...]
    digest: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found. ``ok`` when nothing is wrong."""

    samples: int
    shards: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every shard and every image is as it was indexed."""
        return not self.problems


def index(
    urls: str | Sequence[str], out: str | None = None, *, captions: Literal["required", "optional"] = "required"
) -> IndexReport:
    """Scan shards and write their manifest.

    Args:
        urls: a folder whose ``.tar`` and ``.parquet`` shards are taken (at any depth), or a list of shard URLs.
        out: folder the manifest goes to; the folder itself by default, needed for a list.
        captions: ``optional`` also keeps images without a caption (an image lake that is to be captioned).

    Raises:
        DataError: no shards, no usable sample (with the first reasons), or two samples of one id.
        StorageError: a folder that cannot be listed or written.
    """
    root, found = _shards(urls, out)
    scan = functools.partial(_scan, root=root, need_captions=captions == "required")
    scans = list(map_ordered(scan, [url for url, _ in found], label="Indexing"))
    problems = tuple(problem for one in scans for problem in one.problems)
    shards = tuple(Shard(one.name, one.size, len(one.samples), one.digest) for one in scans)
    table = _table(scans)
    if not len(table):
        raise DataError(
            f"None of the {len(scans)} shard(s) of {root} holds a usable sample. {_first(problems)}",
            "A sample is an image and a caption of one name (KEY.jpg, KEY.txt); `--images-only` takes images alone."
            if any("no caption" in p.reason for p in problems)
            else "Mend or remove these shards.",
        )
    _refuse_collisions(table, shards)
    digest = _digest(shards, table)
    _write(root, shards, table, digest, problems)
    return IndexReport(len(table), len(shards), problems, digest)


def check(url: str) -> CheckReport:
    """Verify an indexed folder: sizes and digests of the shards, and that every image decodes.

    Raises:
        DataError: the folder is not indexed.
    """
    manifest = Manifest.load(url, verify=False)
    numbers = range(len(manifest.shards))
    verify: Callable[[int], list[Problem]] = functools.partial(_check_shard, url)
    problems = [p for found in map_ordered(verify, numbers, label="Checking") for p in found]
    return CheckReport(len(manifest), len(manifest.shards), tuple(problems))


def _shards(urls: str | Sequence[str], out: str | None) -> tuple[str, list[tuple[str, int]]]:
    if isinstance(urls, str):
        root = out or urls
        found = [
            item
            for item in storage.list_files(urls, (".tar", ".parquet"))
            if not item[0].endswith("/" + TABLE_FILE) and item[0] != TABLE_FILE
        ]
        if not found:
            packed = storage.list_files(urls, (".tar.gz", ".tgz", ".tar.zst"))
            raise DataError(
                f"{urls} holds no .tar or .parquet shards.",
                "Unpack the compressed tars: they cannot be read at an offset." if packed else "Check the folder.",
            )
        return root, found
    if not urls or not out:
        raise DataError(
            "A list of shards to index is empty or lacks 'out'.", "Name the shards and a folder for the manifest."
        )
    return out, sorted((url, storage.size(url)) for url in urls)


def _scan(url: str, root: str, need_captions: bool) -> Scan:
    prefix = root.rstrip("/") + "/"
    if url.startswith(prefix):
        name = url[len(prefix) :]
    else:
        name = str(storage.local_path(url).absolute()) if storage.is_local(url) else url
    return scan_shard(url, name, need_captions)


def _table(scans: Sequence[Scan]) -> pa.Table:
    parts = []
    for number, scan in enumerate(scans):
        rows = [{**sample, "shard": number} for sample in scan.samples]
        parts.append(pa.Table.from_pylist(rows, schema=SCHEMA))
    return pa.concat_tables(parts)


def _refuse_collisions(table: pa.Table, shards: Sequence[Shard]) -> None:
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    twins = np.flatnonzero(np.diff(ids[order]) == 0)
    if not len(twins):
        return
    names = [
        f"{shards[table['shard'][int(row)].as_py()].name}/{table['key'][int(row)].as_py()}"
        for row in (order[twins[0]], order[twins[0] + 1])
    ]
    raise DataError(f"The samples {names[0]} and {names[1]} have the same id.", "Rename one of the shards.")


def _digest(shards: Sequence[Shard], table: pa.Table) -> str:
    state = hashlib.sha256(json.dumps([VERSION, [asdict(shard) for shard in shards]]).encode())
    for name in ("id", "image_offset", "image_length", "text_offset", "text_length", "row"):
        state.update(np.ascontiguousarray(table[name].to_numpy(), dtype="<i8").tobytes())
    return state.hexdigest()


def _write(root: str, shards: Sequence[Shard], table: pa.Table, digest: str, problems: Sequence[Problem]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 17)
    storage.make_dirs(root)
    # The header goes last and names the table's digest: a reader between the two writes is told, not misled.
    storage.write_bytes(storage.join(root, TABLE_FILE), sink.getvalue().to_pybytes())
    header = {
        "version": VERSION,
        "digest": digest,
        "samples": len(table),
        "shards": [asdict(shard) for shard in shards],
        "problems": [asdict(problem) for problem in problems],
    }
    storage.write_bytes(storage.join(root, HEADER_FILE), json.dumps(header, indent=1).encode())


def _first(problems: Sequence[Problem], count: int = 3) -> str:
    shown = "; ".join(f"{p.shard} at {p.offset}{f' ({p.key})' if p.key else ''}: {p.reason}" for p in problems[:count])
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return f"{shown}{more}." if shown else ""


def _check_shard(url: str, number: int) -> list[Problem]:
    from isthmus.data.readers import Failure, read_rows
    from isthmus.data.transforms import DecodeError, decode_image

    manifest = _cached(url)
    shard = manifest.shards[number]
    if not storage.exists(manifest.url(number)):
        return [Problem(shard.name, 0, "", "the shard is gone")]
    handle = Sequential(RangeReader(manifest.url(number)))
    handle.drain()
    problems = []
    if handle.digest != shard.digest:
        problems.append(
            Problem(shard.name, 0, "", f"the content has changed ({handle.tell()} bytes, {shard.size} indexed)")
        )
    for row, sample in _rows_of(manifest, number, read_rows):
        offset = manifest.table["image_offset"][row].as_py()
        if isinstance(sample, Failure):
            problems.append(Problem(shard.name, sample.offset, sample.key, sample.reason))
            continue
        try:
            decode_image(sample.image)
        except DecodeError as error:
            problems.append(Problem(shard.name, offset, sample.key, error.reason))
    return problems


def _rows_of(manifest: Manifest, number: int, read_rows: Callable) -> zip:
    rows = np.flatnonzero(manifest.table["shard"].to_numpy() == number)
    return zip(rows.tolist(), read_rows(manifest, rows), strict=True)


@functools.lru_cache(maxsize=4)
def _cached(url: str) -> Manifest:
    return Manifest.load(url, verify=False)
