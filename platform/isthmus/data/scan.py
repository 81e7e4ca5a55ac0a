"""One pass over one shard: where its samples are, and everything that is wrong with it.

A tar is parsed header by header here instead of by an iterator that stops at the first oddity: an archive that was cut
at a member boundary looks complete to such an iterator. Every fault is a :class:`Problem`; none is passed over.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from isthmus.data.captions import TEXT_KINDS, as_captions, parse_captions
from isthmus.data.ranges import RangeReader, Sequential
from isthmus.errors import DataError, IsthmusError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
IMAGE_ID_COLUMN = "image_id"
KEY_COLUMNS = ("key", "__key__", IMAGE_ID_COLUMN, "id")

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("image_ext", pa.string()),
        ("text_offset", pa.int64()),
        ("text_length", pa.int64()),
        ("text_ext", pa.string()),
        ("meta_offset", pa.int64()),
        ("meta_length", pa.int64()),
        ("row", pa.int64()),
        ("image_id", pa.int64()),
    ]
)
"""Columns of a manifest. Offsets and lengths are bytes in the shard, -1 where there is no such member; ``row`` is the
row in a Parquet shard, -1 in tars; ``image_id`` is null where the data names none."""


@dataclass(frozen=True)
class Problem:
    """A fault found while indexing: shard's name, byte offset (Parquet: row), key ("" where none) and the reason."""

    shard: str
    offset: int
    key: str
    reason: str


@dataclass
class Scan:
    """What one shard holds: its bytes and sha256, one dict of ``SCHEMA`` columns per sample, and its problems."""

    name: str
    size: int = 0
    digest: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(self, offset: int, key: str, reason: str) -> None:
        """Note a fault."""
        self.problems.append(Problem(self.name, offset, key, reason))


def sample_id(shard: str, key: str) -> int:
    """63-bit id of a sample: blake2b of ``shard/key``. Stays the same wherever the folder is copied to."""
    return _hashed(f"{shard}/{key}")


def image_id(value: Any) -> int | None:
    """int64 id of the image that a sample's ``image_id`` names: an integer as it is, a text hashed as sample ids are.

    None (no such field) stays None. ValueError with the reason for anything else.
    """
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # how a table holds integers of which some are missing
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -(1 << 63) <= value < 1 << 63 else _hashed(str(value))
    if isinstance(value, str) and value:
        return _hashed(value)
    raise ValueError("'image_id' is neither an integer nor a text; the sample counts as an image of its own")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def scan_shard(url: str, name: str, need_captions: bool) -> Scan:
    """Index one ``.tar`` or ``.parquet`` shard. Unreadable shards give a scan without samples and one problem."""
    scan = Scan(name)
    try:
        if url.endswith(".parquet"):
            _scan_parquet(url, scan, need_captions)
        else:
            _scan_tar(url, scan, need_captions)
    except DataError:
        raise
    except (IsthmusError, OSError, pa.ArrowException) as error:
        scan.report(0, "", str(error))
    return scan


# ---------------------------------------------------------------------------------------------------- tar


class _State(tarfile.TarFile):
    """The state that ``TarInfo.fromtarfile`` wants; walking is done by :func:`_members`."""

    def next(self) -> tarfile.TarInfo | None:
        return None


def _members(handle: Sequential, scan: Scan) -> Iterator[tarfile.TarInfo]:
    """Regular members whose data is wholly there; how the archive ends is checked."""
    state = _State(fileobj=handle, mode="r")  # type: ignore[arg-type]
    while True:
        handle.seek(state.offset)
        at = handle.tell()
        try:
            info = tarfile.TarInfo.fromtarfile(state)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                scan.report(at, "", "only one of the two end-of-archive blocks is there")
            return
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if not at:
                scan.report(0, "", "the archive is empty (0 bytes)")
            elif at < state.offset:
                scan.report(at, "", f"the archive is cut short: the padding behind byte {at} is missing")
            else:
                scan.report(at, "", "the end-of-archive blocks are missing: the archive may have been cut short here")
            return
        except (tarfile.HeaderError, tarfile.TarError, ValueError, EOFError) as error:  # type: ignore[attr-defined]
            scan.report(at, "", f"damaged or cut tar header ({error}); what follows it is not indexed")
            return
        if not info.isreg():
            continue
        if info.offset_data + info.size > scan.size:
            there = max(0, scan.size - info.offset_data)
            scan.report(info.offset, _split(info.name)[0], f"{info.name} is cut short: {there} of {info.size} bytes")
            return
        yield info


def _scan_tar(url: str, scan: Scan, need_captions: bool) -> None:
    source = RangeReader(url)
    scan.size = source.size
    handle = Sequential(source)
    group = _Group("", -1)
    seen: set[str] = set()
    for info in _members(handle, scan):
        key, extension = _split(info.name)
        if not extension or PurePosixPath(info.name).name.startswith("."):
            continue
        if key != group.key:
            group.finish(scan, need_captions)
            group = _Group(key, info.offset)
            if key in seen:
                group.repeated = True
                scan.report(info.offset, key, "the key occurs a second time in this shard; only the first one is kept")
            seen.add(key)
        group.add(scan, info, extension, handle)
    group.finish(scan, need_captions)
    end = handle.tell()
    if handle.drain():
        scan.report(end, "", "there is data behind the end of the archive; it is not indexed")
    scan.digest = handle.digest
    source.close()


@dataclass
class _Group:
    """Members of one key on their way to a sample."""

    key: str
    offset: int
    repeated: bool = False
    image: tuple[int, int, str] | None = None
    texts: dict[str, tuple[int, int, tuple[str, ...]]] = field(default_factory=dict)
    image_id: int | None = None

    def add(self, scan: Scan, info: tarfile.TarInfo, extension: str, handle: Sequential) -> None:
        kind = extension.rsplit(".", 1)[-1].lower()
        if self.repeated or kind not in (*IMAGE_KINDS, *TEXT_KINDS):
            return
        if not info.size:
            scan.report(info.offset, self.key, f"the member .{extension} is empty")
        elif kind in IMAGE_KINDS:
            if self.image is None:
                self.image = (info.offset_data, info.size, kind)
            else:
                scan.report(info.offset, self.key, f"a second image (.{extension}) of one key; the first one is kept")
        elif kind not in self.texts:
            try:
                found, meta = parse_captions(handle.read(info.size), kind)
                self.texts[kind] = (info.offset_data, info.size, found)
                self.image_id = image_id(meta.get("image_id")) if kind == "json" else self.image_id
            except ValueError as error:
                scan.report(info.offset, self.key, str(error))

    def finish(self, scan: Scan, need_captions: bool) -> None:
        if self.repeated or not (self.image or self.texts):
            return
        if self.image is None:
            scan.report(self.offset, self.key, "the sample has no image")
            return
        kind = next((k for k in TEXT_KINDS if k in self.texts and self.texts[k][2]), "")
        if need_captions and not kind:
            scan.report(self.offset, self.key, "the sample has no caption (.txt, or .json with 'caption')")
            return
        text = self.texts.get(kind, (-1, -1, ()))
        meta = self.texts.get("json", (-1, -1, ()))
        scan.samples.append(
            {
                "id": sample_id(scan.name, self.key),
                "key": self.key,
                "image_offset": self.image[0],
                "image_length": self.image[1],
                "image_ext": self.image[2],
                "text_offset": text[0],
                "text_length": text[1],
                "text_ext": kind,
                "meta_offset": meta[0],
                "meta_length": meta[1],
                "row": -1,
                "image_id": self.image_id,
            }
        )


def _split(name: str) -> tuple[str, str]:
    """(key, extension) by webdataset's rule: the base name is cut at its first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


# ------------------------------------------------------------------------------------------------ parquet


def parquet_columns(schema: pa.Schema, where: str) -> tuple[str, str | None, str | None]:
    """(image, caption or None, key or None): the columns that hold them.

    Raises:
        DataError: no column can hold the images.
    """
    image = next((n for n in IMAGE_COLUMNS if n in schema.names and _holds_bytes(schema.field(n).type)), None)
    if image is None:
        raise DataError(
            f"{where} has no column of image bytes; its columns are {', '.join(schema.names)}.",
            f"Name the column one of {', '.join(IMAGE_COLUMNS)} (binary, or a struct with 'bytes').",
        )
    pick = lambda names: next((n for n in names if n in schema.names and n != image), None)  # noqa: E731
    return image, pick(CAPTION_COLUMNS), pick(KEY_COLUMNS)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def image_lengths(column: pa.ChunkedArray) -> list[int | None]:
    """Bytes of each image of a Parquet column."""
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return pc.binary_length(column).to_pylist()


def _scan_parquet(url: str, scan: Scan, need_captions: bool) -> None:
    source = RangeReader(url)
    scan.size = source.size
    handle = Sequential(source)
    handle.drain()
    scan.digest = handle.digest
    from isthmus import storage

    with storage.open_input(url) as opened:
        file = pq.ParquetFile(opened)
        image, caption, key = parquet_columns(file.schema_arrow, url)
        owner = IMAGE_ID_COLUMN if IMAGE_ID_COLUMN in file.schema_arrow.names and image != IMAGE_ID_COLUMN else None
        columns = list(dict.fromkeys(name for name in (image, caption, key, owner) if name))
        seen: set[str] = set()
        rows_of_image: Counter[str] = Counter()
        row = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            lengths = image_lengths(table[image])
            captions: Iterable[Any] = table[caption].to_pylist() if caption else [None] * len(table)
            keys = [str(k) for k in table[key].to_pylist()] if key else [f"{row + i:09d}" for i in range(len(table))]
            owners: Iterable[Any] = table[owner].to_pylist() if owner else [None] * len(table)
            for length, text, name, of in zip(lengths, captions, keys, owners, strict=True):
                if key == IMAGE_ID_COLUMN:  # it names images, and an image may have a row for each of its captions
                    rows_of_image[name] += 1
                    name = name if rows_of_image[name] == 1 else f"{name}#{rows_of_image[name]}"
                _parquet_row(scan, row, length, as_captions(text), name, of, seen, need_captions)
                row += 1
    source.close()


def _parquet_row(
    scan: Scan,
    row: int,
    length: int | None,
    captions: tuple[str, ...],
    key: str,
    owner: Any,
    seen: set[str],
    need_captions: bool,
) -> None:
    if key in seen:
        scan.report(row, key, "the key occurs a second time in this shard; only the first one is kept")
        return
    seen.add(key)
    if not length:
        scan.report(row, key, "the image is empty")
    elif need_captions and not captions:
        scan.report(row, key, "the sample has no caption")
    else:
        names = ("image_offset", "text_offset", "text_length", "meta_offset", "meta_length")
        kind = "column" if captions else ""
        fields = {"id": sample_id(scan.name, key), "key": key, "image_length": length, "image_ext": "", "row": row}
        try:
            image: int | None = image_id(owner)
        except ValueError as error:
            image = None
            scan.report(row, key, str(error))
        scan.samples.append({**dict.fromkeys(names, -1), **fields, "text_ext": kind, "image_id": image})
