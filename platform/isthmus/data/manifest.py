"""The manifest: what a data set holds, sample by sample, with byte offsets and digests.

``index`` scans the shards below a folder once and writes ``manifest.parquet`` (one row per sample) and
``manifest.json`` (schema version, digest, shards) beside them, and of a large set ``manifest.pages``, the rows again in
a form that gives any of them without the others. Everything that reads data afterwards reads by the manifest's offsets,
so no sample can be lost or repeated on the way, and "the data" of a run is one digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.assembly import Assembly
from isthmus.data.listing import HEADER_FILE, TABLE_FILE, Found, find, require_index
from isthmus.data.pages import PAGES_FILE, Pages
from isthmus.data.parallel import map_ordered
from isthmus.data.records import IMAGE_ID_COLUMN, Problem
from isthmus.data.reuse import Before, Part, save_stamps, stamps_of
from isthmus.data.rows import Rows, Whole, image_ids, integers
from isthmus.data.scan import scan_shard
from isthmus.data.uris import store_of
from isthmus.errors import DataError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of samples. ``name`` is relative to the manifest's folder, or a whole URL; ``size`` is in bytes."""

    name: str
    size: int
    samples: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """An indexed data set.

    Rows are asked for by number: ``take``, ``ids_of`` and so on read those rows alone where the set is large. The
    properties ``table``, ``ids``, ``image_ids`` and ``image_bytes`` hold whole columns, 8 bytes a sample and more (the
    table some 100); training and bulk jobs do without them.

    Attributes:
        root: URL of the folder.
        digest: sha256 over the shards' names, sizes and digests and over the table; independent of where it lies.
        shards: in the order that the column ``shard`` counts.
        rows: one per sample, columns of :data:`isthmus.data.records.SCHEMA`, ordered by (shard, offset).
        images_from: further places of images that tables name, beside the store that ``root`` is in.
        subset_of: digest of the data set that these samples were chosen from, ids and all; "" where none was.
    """

    root: str
    digest: str
    shards: tuple[Shard, ...]
    rows: Rows
    images_from: tuple[str, ...] = ()
    subset_of: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: Sequence[int] | np.ndarray) -> pa.Table:
        """The rows ``numbers``, in that order. IndexError for a number that is no row's."""
        return self.rows.take(numbers)

    def ids_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sample ids of rows, int64 [len(numbers)]."""
        return self.rows.take(numbers, ["id"])["id"].to_numpy()

    def image_ids_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids of the rows' images, int64 [len(numbers)]: equal where the data says so, else the sample's own id."""
        return image_ids(self.rows.take(numbers, self._image_columns))

    def image_bytes_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sizes of the rows' encoded images, int64 [len(numbers)]; 0 where the index could not tell."""
        return np.maximum(self.rows.take(numbers, ["image_length"])["image_length"].to_numpy(), 0)

    def sound_bytes_of(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sizes of the rows' sound files, int64 [len(numbers)]; 0 where there is none."""
        if not self.knows_sounds:
            return np.zeros(len(numbers), np.int64)
        return np.maximum(integers(self.rows.take(numbers, ["audio_length"])["audio_length"]), 0)

    @property
    def knows_sounds(self) -> bool:
        """Whether it was written with the places of sound files. Older ones were not."""
        return "audio_length" in self.rows.column_names

    @property
    def _image_columns(self) -> list[str]:
        return ["id", IMAGE_ID_COLUMN] if self.names_images else ["id"]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(shard.samples for shard in self.shards)])

    def rows_of(self, shard: int) -> range:
        """Numbers of the rows of shard number ``shard``."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def shard_of(self, number: int) -> Shard:
        """The shard of a row."""
        return self.shards[int(np.searchsorted(self._starts, number, side="right")) - 1]

    @functools.cached_property
    def table(self) -> pa.Table:
        """All rows, in memory."""
        return self.rows.whole()

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """All sample ids, int64 [len]."""
        return self.rows.column("id")

    @property
    def names_images(self) -> bool:
        """Whether it was written with the images' ids. Older ones were not; their digest is the same."""
        return IMAGE_ID_COLUMN in self.rows.column_names

    @property
    def repeats_images(self) -> bool:
        """Whether two samples have the same image id."""
        return self.rows.repeated_images

    @functools.cached_property
    def image_ids(self) -> np.ndarray:
        """Id of each sample's image, int64 [len]: equal where the data says so, else the sample's own id."""
        return image_ids(self.rows.whole(self._image_columns))

    @functools.cached_property
    def image_bytes(self) -> np.ndarray:
        """Size of each encoded image, int64 [len]; 0 where the index could not tell."""
        return np.maximum(self.rows.column("image_length"), 0)

    @property
    def captioned(self) -> int:
        """Samples that have a caption."""
        return self.rows.captioned

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the data sets whose feature caches hold its samples: its own, and of what it is a subset of."""
        return (self.digest, self.subset_of) if self.subset_of else (self.digest,)

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
        require_index(url)
        try:
            header = json.loads(storage.read_bytes(storage.join(url, HEADER_FILE)))
            version = header["version"]
            shards = tuple(Shard(**shard) for shard in header["shards"])
            rows = _rows(url, header)
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(f"The manifest of {url} is damaged: {error}.", "Index the folder again.") from error
        if version != VERSION:
            raise DataError(f"The manifest of {url} has version {version}, not {VERSION}.", "Index the folder again.")
        origin = header.get("subset_of") or {}
        manifest = cls(
            url, header["digest"], shards, rows, tuple(header.get("images_from", ())), str(origin.get("digest", ""))
        )
        # The digest is made of all rows; pages name the one that they belong to and need not be read for it.
        whole = isinstance(rows, Whole)
        if len(rows) != sum(shard.samples for shard in shards) or (
            whole and digest_of(shards, lambda name: [rows.column(name)], _has_sounds(rows)) != manifest.digest
        ):
            raise DataError(
                f"{HEADER_FILE} and {TABLE_FILE if whole else PAGES_FILE} of {url} do not belong together.",
                "Index the folder again.",
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
    kept = {file.name for file in found if before.knows(file, stamps[file.name])}
    scan = functools.partial(_scan, need_captions=captions == "required", places=(own, *more))
    scanned = map_ordered(scan, [file for file in found if file.name not in kept], label="Indexing")
    shards: list[Shard] = []
    problems: list[Problem] = []
    settled: dict[str, str] = {}
    with Assembly(root) as rows:
        for file in found:
            part = before.part(file.name) if file.name in kept else next(scanned)
            part = part or scan(file)  # the rows that were to be kept cannot be read
            if part.passed_over:
                continue
            rows.add(part.table, len(shards))
            shards.append(Shard(part.name, part.size, len(part.table), part.digest))
            problems += part.problems
            settled[part.name] = stamps[part.name] if part.final else ""
        next(scanned, None)  # lets the progress bar end
        rows.complete()
        if not rows.rows:
            raise DataError(
                f"None of the {len(shards)} shard(s) of {root} holds a usable sample. {_first(problems)}",
                "A sample is an image and a caption of one name (KEY.jpg, KEY.txt); `--images-only` takes images alone."
                if any("no caption" in p.reason for p in problems)
                else "Mend or remove these shards.",
            )
        _refuse_collisions(rows, shards)
        digest = digest_of(shards, rows.column, rows.sounds > 0)
        header = header_of(shards, rows.rows, digest, problems, more if rows.names_files else ())
        save_stamps(root, settled, rules, *write(root, rows, header))
    return IndexReport(
        rows.rows, len(shards), tuple(problems), digest, reused=len(kept), passed_over=len(found) - len(shards)
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


def _rows(url: str, header: dict[str, Any]) -> Rows:
    if (pages := header.get("pages")) is not None:
        return Pages(storage.join(url, PAGES_FILE), header["digest"], pages)
    return Whole(pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(url, TABLE_FILE)))))


def _has_sounds(rows: Rows) -> bool:
    return "audio_length" in rows.column_names and bool((rows.column("audio_length") >= 0).any())


def _refuse_collisions(rows: Assembly, shards: Sequence[Shard]) -> None:
    if twins := rows.twins():
        names = [f"{shards[row['shard']].name}/{row['key']}" for row in twins]
        raise DataError(f"The samples {names[0]} and {names[1]} have the same id.", "Rename one of the shards.")


def digest_of(shards: Sequence[Shard], column: Callable[[str], Iterable[np.ndarray]], sounds: bool = False) -> str:
    """The digest of a manifest.

    Args:
        shards: all of them.
        column: the pieces of a column of the table, by its name.
        sounds: whether any row has a sound file; the digest of other sets is what it was before there were any.
    """
    state = hashlib.sha256(json.dumps([VERSION, [asdict(shard) for shard in shards]]).encode())
    names = ("id", "image_offset", "image_length", "text_offset", "text_length", "row")
    for name in (*names, *(("audio_offset", "audio_length") if sounds else ())):
        for piece in column(name):
            state.update(np.ascontiguousarray(piece, dtype="<i8").data)
    return state.hexdigest()


def header_of(
    shards: Sequence[Shard],
    samples: int,
    digest: str,
    problems: Sequence[Problem] = (),
    images_from: Sequence[str] = (),
) -> dict[str, Any]:
    """What stands in ``manifest.json``; of a large set ``pages`` is added."""
    header: dict[str, Any] = {
        "version": VERSION,
        "digest": digest,
        "samples": samples,
        "shards": [asdict(shard) for shard in shards],
        "problems": [asdict(problem) for problem in problems],
    }
    if images_from:
        header["images_from"] = list(images_from)
    return header


def write(root: str, rows: Assembly, header: dict[str, Any]) -> tuple[bytes, bytes]:
    """Writes a complete manifest. Returns the bytes of its header, and of its table where that is not paged."""
    storage.make_dirs(root)
    # The header goes last and names the table's digest: a reader between the two writes is told, not misled.
    more, table_bytes = rows.write(header["digest"])
    header_bytes = json.dumps(header | more, indent=1).encode()
    storage.write_bytes(storage.join(root, HEADER_FILE), header_bytes)
    if not more:
        storage.delete(storage.join(root, PAGES_FILE))  # of a time when there were more rows
    return header_bytes, table_bytes


def _first(problems: Sequence[Problem], count: int = 3) -> str:
    shown = "; ".join(f"{p.shard} at {p.offset}{f' ({p.key})' if p.key else ''}: {p.reason}" for p in problems[:count])
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return f"{shown}{more}." if shown else ""
