"""Image-text pairs as webdataset tars or Parquet files: the same samples always give the same bytes.

Each shard is built in memory and handed to storage as one write, so that a shard is there whole or not at all and
memory is bounded by one shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.errors import DataError

Format = Literal["tar", "parquet"]

PARQUET_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("meta", pa.string()),
    ]
)
_ROW_GROUP = 64


@dataclass(frozen=True)
class Pair:
    """One sample to write.

    Attributes:
        key: unique within the data set; no dot, no slash.
        image: encoded bytes.
        extension: the image's file name ending without the dot (``png``, ``webp``, ``jpg``).
        captions: the main one first.
        meta: JSON-able facts.
        sound: encoded bytes of its sound file, with that one's ending; None where it has none.
    """

    key: str
    image: bytes
    extension: str
    captions: Sequence[str]
    meta: Mapping[str, Any] = field(default_factory=dict)
    sound: tuple[bytes, str] | None = None


@dataclass(frozen=True)
class ShardFile:
    """A written shard: its path relative to the output, size in bytes, sha256 and number of samples."""

    path: str
    size: int
    sha256: str
    samples: int


def write_shards(
    pairs: Iterable[Pair],
    out: str,
    *,
    folder: str,
    shard_size: int = 512,
    max_bytes: int = 256 * 2**20,
    kind: Format = "tar",
) -> Iterator[ShardFile]:
    """Writes ``out/folder/folder-00000.tar`` and on; yields each shard once it is stored.

    Args:
        pairs: read once, one shard ahead at most.
        out: folder or URL.
        folder: name of the split; also the beginning of the shards' names.
        shard_size: samples in a shard.
        max_bytes: a shard is closed early once its images reach this size.
        kind: ``tar`` (KEY.json, KEY.txt with one caption a line, KEY.png ...) or ``parquet`` (columns key, image,
            captions, meta as JSON text).

    Raises:
        DataError: a key that a tar cannot hold, or a sample without caption.
        StorageError: the output cannot be written.
    """
    for number, group in enumerate(_groups(pairs, shard_size, max_bytes)):
        data = tar_bytes(group) if kind == "tar" else parquet_bytes(group)
        path = f"{folder}/{folder}-{number:05d}.{kind}"
        storage.write_bytes(storage.join(out, path), data)
        yield ShardFile(path, len(data), hashlib.sha256(data).hexdigest(), len(group))


def tar_bytes(pairs: Sequence[Pair]) -> bytes:
    """A webdataset tar: no time stamps, no owners, fixed member order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            _check(pair)
            members = [
                ("json", _json(pair.meta).encode()),
                ("txt", ("\n".join(pair.captions) + "\n").encode()),
                (pair.extension, pair.image),
            ]
            if pair.sound is not None:
                members.append((pair.sound[1], pair.sound[0]))
            for extension, data in members:
                info = tarfile.TarInfo(f"{pair.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_bytes(pairs: Sequence[Pair]) -> bytes:
    """A Parquet file with small row groups, so that a few rows can be read without the rest."""
    for pair in pairs:
        _check(pair)
        if pair.sound is not None:
            raise DataError("Parquet shards hold no sounds.", "Write tars.")
    table = pa.table(
        {
            "key": [pair.key for pair in pairs],
            "image": [pair.image for pair in pairs],
            "captions": [list(pair.captions) for pair in pairs],
            "meta": [_json({**pair.meta, "extension": pair.extension}) for pair in pairs],
        },
        schema=PARQUET_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False)
    return bytes(sink.getvalue())


def _groups(pairs: Iterable[Pair], shard_size: int, max_bytes: int) -> Iterator[list[Pair]]:
    group: list[Pair] = []
    held = 0
    for pair in pairs:
        group.append(pair)
        held += len(pair.image)
        if len(group) >= shard_size or held >= max_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group


def _check(pair: Pair) -> None:
    if not pair.key or "." in pair.key or "/" in pair.key or len(pair.key.encode()) > 90:
        raise DataError(f"'{pair.key}' cannot be a sample's key.", "Use at most 90 bytes without dots and slashes.")
    if not pair.captions or any(not text.strip() or "\n" in text for text in pair.captions):
        raise DataError(f"Sample '{pair.key}' has an empty caption or one of several lines.", "Give one line each.")


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
