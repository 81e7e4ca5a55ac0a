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
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.listing import HEADER_FILE, TABLE_FILE, Found, find
from isthmus.data.parallel import map_ordered
from isthmus.data.records import IMAGE_ID_COLUMN, URI, Problem
from isthmus.data.reuse import Before, Part, joined, save_stamps, stamps_of
from isthmus.data.scan import scan_shard
from isthmus.data.uris import store_of
from isthmus.errors import DataError

VERSION = 1


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
        table: one row per sample, columns of :data:`isthmus.data.records.SCHEMA`, ordered by (shard, offset).
        images_from: further places of images that tables name, beside the store that ``root`` is in.
    """

    root: str
    digest: str
    shards: tuple[Shard, ...]
    table: pa.Table
    images_from: tuple[str, ...] = ()

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

    @property
    def places(self) -> tuple[str, ...]:
        """URLs below which images may lie that a table names (:func:`isthmus.data.uris.image_url`)."""
        return (store_of(self.root), *self.images_from)

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
        manifest = cls(url, header["digest"], shards, table, tuple(header.get("images_from", ())))
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
    """What ``index`` found.

    Attributes:
        samples: usable ones.
        shards: of them ``reused`` were not read, since they are as the last index saw them.
        problems: the faults.
        digest: the manifest's.
        passed_over: Parquet files beside a tar of the same name that hold no images: tables of its meta data.
    """

    samples: int
    shards: int
    problems: tuple[Problem, ...]
    digest: str = ""
    reused: int = 0
    passed_over: int = 0


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
    urls: str | Sequence[str],
    out: str | None = None,
    *,
    captions: Literal["required", "optional"] = "required",
    images_from: Sequence[str] = (),
    fresh: bool = False,
) -> IndexReport:
    """Scan shards and write their manifest. Shards that have not changed since the last index are not read.

    Args:
        urls: a folder whose ``.tar`` and ``.parquet`` shards are taken (at any depth), or a list of folders and shards.
        out: folder the manifest goes to; the folder itself by default, needed for a list.
        captions: ``optional`` also keeps images without a caption (an image lake that is to be captioned).
        images_from: further URLs below which images may lie that Parquet files name; their own store always counts.
        fresh: read every shard, whatever the last index knows.

    Raises:
        DataError: no shards, no usable sample (with the first reasons), or two samples of one id.
        StorageError: a folder that cannot be listed or written.
    """
    root, found = find(urls, out)
    own = store_of(root)
    stores = [store_of(url) for url in ([urls] if isinstance(urls, str) else urls)]
    more = sorted({*images_from, *stores} - {own})
    rules = {"captions": captions}
    before = Before() if fresh else Before.load(root, rules)
    stamps = stamps_of(found)
    kept = {file.name: part for file in found if (part := before.part(file, stamps[file.name]))}
    scan = functools.partial(_scan, need_captions=captions == "required", places=(own, *more))
    rest = [file for file in found if file.name not in kept]
    kept |= {part.name: part for part in map_ordered(scan, rest, label="Indexing")}
    parts = [part for file in found if not (part := kept[file.name]).passed_over]
    problems = tuple(problem for part in parts for problem in part.problems)
    shards = tuple(Shard(part.name, part.size, len(part.table), part.digest) for part in parts)
    table = joined(parts)
    if not len(table):
        raise DataError(
            f"None of the {len(parts)} shard(s) of {root} holds a usable sample. {_first(problems)}",
            "A sample is an image and a caption of one name (KEY.jpg, KEY.txt); `--images-only` takes images alone."
            if any("no caption" in p.reason for p in problems)
            else "Mend or remove these shards.",
        )
    _refuse_collisions(table, shards)
    digest = _digest(shards, table)
    stamps = {part.name: stamps[part.name] if part.final else "" for part in parts}
    _write(root, shards, table, digest, problems, more, stamps, rules)
    return IndexReport(
        len(table), len(shards), problems, digest, reused=len(found) - len(rest), passed_over=len(found) - len(parts)
    )


def check(url: str) -> CheckReport:
    """Verify an indexed folder: sizes and digests of the shards, that every image decodes, and every fault of the
    shards that kept samples out of the index.

    Raises:
        DataError: the folder is not indexed.
    """
    from isthmus.data.check import check_shard  # reads through this module's Manifest

    manifest = Manifest.load(url, verify=False)
    numbers = range(len(manifest.shards))
    verify: Callable[[int], list[Problem]] = functools.partial(check_shard, url, manifest.digest)
    problems = [p for found in map_ordered(verify, numbers, label="Checking") for p in found]
    return CheckReport(len(manifest), len(manifest.shards), tuple(problems))


def _scan(file: Found, need_captions: bool, places: Sequence[str]) -> Part:
    return Part.of(scan_shard(file.url, file.name, need_captions, places, file.beside_tar))


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


def _write(
    root: str,
    shards: Sequence[Shard],
    table: pa.Table,
    digest: str,
    problems: Sequence[Problem],
    images_from: Sequence[str],
    stamps: dict[str, str],
    rules: dict[str, Any],
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 17)
    table_bytes = sink.getvalue().to_pybytes()
    header: dict[str, Any] = {
        "version": VERSION,
        "digest": digest,
        "samples": len(table),
        "shards": [asdict(shard) for shard in shards],
        "problems": [asdict(problem) for problem in problems],
    }
    if images_from and pc.any(pc.equal(table["image_ext"], URI)).as_py():
        header["images_from"] = list(images_from)
    header_bytes = json.dumps(header, indent=1).encode()
    storage.make_dirs(root)
    # The header goes last and names the table's digest: a reader between the two writes is told, not misled.
    storage.write_bytes(storage.join(root, TABLE_FILE), table_bytes)
    storage.write_bytes(storage.join(root, HEADER_FILE), header_bytes)
    save_stamps(root, stamps, rules, header_bytes, table_bytes)


def _first(problems: Sequence[Problem], count: int = 3) -> str:
    shown = "; ".join(f"{p.shard} at {p.offset}{f' ({p.key})' if p.key else ''}: {p.reason}" for p in problems[:count])
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return f"{shown}{more}." if shown else ""
