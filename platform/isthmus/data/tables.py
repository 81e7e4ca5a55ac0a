"""Parquet shards: which columns hold what, and one pass over the rows of one.

A row holds its image as bytes, or names a file of the same store that does. Files named so are looked up here, so that
one that is missing is a fault of the index and not of a training run.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.captions import as_captions
from isthmus.data.ranges import RangeReader, Sequential
from isthmus.data.records import IMAGE_ID_COLUMN, URI, Scan, image_id, sample_id
from isthmus.data.uris import image_url
from isthmus.errors import DataError, StorageError

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "bytes")
URI_COLUMNS = ("image_uri", "image_path", "image", "uri", "path", "file_name", "filename", "file", "image_url", "url")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
KEY_COLUMNS = ("key", "__key__", IMAGE_ID_COLUMN, "id")

_LOOKUPS = 16  # files asked for at once


class Columns(NamedTuple):
    """Names of a table's columns, None where there is none; ``uris`` where the images are named instead of held."""

    image: str
    caption: str | None
    key: str | None
    uris: bool


def parquet_columns(schema: pa.Schema, where: str) -> Columns:
    """The columns that hold images, captions and keys.

    Raises:
        DataError: no column can hold or name the images.
    """
    held = _held(schema)
    image = held or next((n for n in URI_COLUMNS if n in schema.names and _holds_text(schema.field(n).type)), None)
    if image is None:
        raise DataError(
            f"{where} has no column of image bytes or image files; its columns are {', '.join(schema.names)}.",
            f"Name the column one of {', '.join(IMAGE_COLUMNS)} (binary, or a struct with 'bytes'), or one of "
            f"{', '.join(URI_COLUMNS[:-2])} where it names files.",
        )
    pick = lambda names: next((n for n in names if n in schema.names and n != image), None)  # noqa: E731
    return Columns(image, pick(CAPTION_COLUMNS), pick(KEY_COLUMNS), held is None)


def _held(schema: pa.Schema) -> str | None:
    """The column of image bytes."""
    return next((n for n in IMAGE_COLUMNS if n in schema.names and _holds_bytes(schema.field(n).type)), None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def image_lengths(column: pa.ChunkedArray) -> list[int | None]:
    """Bytes of each image of a Parquet column."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return pc.binary_length(column).to_pylist()


Length = int | None | str
"""Bytes of a row's image; None where there is none; a text says why it cannot be had."""


def scan_parquet(url: str, scan: Scan, need_captions: bool, places: Sequence[str], beside_tar: bool) -> None:
    """Index one Parquet shard into ``scan``; see :func:`isthmus.data.scan.scan_shard`."""
    source = RangeReader(url)
    scan.size = source.size
    handle = Sequential(source)
    handle.drain()
    scan.digest = handle.digest
    with storage.open_input(url) as opened:
        file = pq.ParquetFile(opened)
        if beside_tar and not _held(file.schema_arrow):
            scan.passed_over = True
            return
        _scan_rows(file, parquet_columns(file.schema_arrow, url), url, scan, need_captions, places)
    source.close()


def _scan_rows(
    file: pq.ParquetFile, columns: Columns, url: str, scan: Scan, need_captions: bool, places: Sequence[str]
) -> None:
    image, caption, key, uris = columns
    scan.final = not uris
    lengths_of: Callable[[pa.ChunkedArray], Sequence[Length]] = image_lengths
    if uris:
        lengths_of = functools.partial(_file_lengths, shard=url, places=places)
    owner = IMAGE_ID_COLUMN if IMAGE_ID_COLUMN in file.schema_arrow.names and image != IMAGE_ID_COLUMN else None
    wanted = list(dict.fromkeys(name for name in (image, caption, key, owner) if name))
    seen: set[str] = set()
    rows_of_image: Counter[str] = Counter()
    row = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=wanted)
        captions: Iterable[Any] = table[caption].to_pylist() if caption else [None] * len(table)
        keys = [str(k) for k in table[key].to_pylist()] if key else [f"{row + i:09d}" for i in range(len(table))]
        owners: Iterable[Any] = table[owner].to_pylist() if owner else [None] * len(table)
        for length, text, name, of in zip(lengths_of(table[image]), captions, keys, owners, strict=True):
            if key == IMAGE_ID_COLUMN:  # it names images, and an image may have a row for each of its captions
                rows_of_image[name] += 1
                name = name if rows_of_image[name] == 1 else f"{name}#{rows_of_image[name]}"
            if name in seen:
                scan.report(row, name, "the key occurs a second time in this shard; only the first one is kept")
            else:
                seen.add(name)
                _add_row(scan, row, length, URI if uris else "", as_captions(text), name, of, need_captions)
            row += 1


def _add_row(
    scan: Scan,
    row: int,
    length: Length,
    kind: str,
    captions: tuple[str, ...],
    key: str,
    owner: Any,
    need_captions: bool,
) -> None:
    if isinstance(length, str):
        scan.report(row, key, length)
    elif not length:
        scan.report(row, key, "the image is empty")
    elif need_captions and not captions:
        scan.report(row, key, "the sample has no caption")
    else:
        names = ("image_offset", "text_offset", "text_length", "meta_offset", "meta_length")
        text = "column" if captions else ""
        fields = {"id": sample_id(scan.name, key), "key": key, "image_length": length, "image_ext": kind, "row": row}
        try:
            image: int | None = image_id(owner)
        except ValueError as error:
            image = None
            scan.report(row, key, str(error))
        scan.samples.append({**dict.fromkeys(names, -1), **fields, "text_ext": text, "image_id": image})


def _file_lengths(column: pa.ChunkedArray, shard: str, places: Sequence[str]) -> list[Length]:
    """Bytes of the files that a column names."""

    def length(uri: str | None) -> Length:
        if uri is None:
            return None
        try:
            filesystem, path = storage.resolve(image_url(uri, shard, places))
            info = filesystem.get_file_info(path)
        except (ValueError, StorageError, OSError, pa.ArrowException) as error:
            return str(error)
        if not info.is_file:
            return f"the image file {uri} is not there"
        return f"the store does not say how large {uri} is" if info.size is None else int(info.size)

    with ThreadPoolExecutor(_LOOKUPS) as pool:
        return list(pool.map(length, column.to_pylist()))
