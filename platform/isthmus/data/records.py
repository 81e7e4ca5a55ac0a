"""What an index says of samples: the columns of its table, ids, and faults with their place and reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
VIDEO_KINDS = ("mp4", "mov", "webm", "mkv")
SOUND_KINDS = ("wav", "ogg", "flac", "mp3")
IMAGE_ID_COLUMN = "image_id"
URI = "uri"
"""``image_ext`` of a sample whose image is a file of its own."""

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
row in a Parquet shard, -1 in tars; ``image_ext`` is :data:`URI` where the row names a file that holds the image;
``meta`` is the ``.json`` member, or the ``.cls`` where there is none; ``image_id`` is null where none is named. A clip
stands where an image does, and ``image_ext`` tells which it is."""

HEARD_SCHEMA = pa.schema(
    [*SCHEMA, ("audio_offset", pa.int64()), ("audio_length", pa.int64()), ("audio_ext", pa.string())]
)
"""Columns of a manifest in which any sample has a sound file. They are null where a sample has none; a clip's own sound
track is no member."""


def schema_of(column_names: Iterable[str]) -> pa.Schema:
    """:data:`SCHEMA`, or :data:`HEARD_SCHEMA` where there are columns of sounds."""
    return HEARD_SCHEMA if "audio_length" in column_names else SCHEMA


@dataclass(frozen=True)
class Problem:
    """A fault found while indexing: shard's name, byte offset (Parquet: row), key ("" where none) and the reason."""

    shard: str
    offset: int
    key: str
    reason: str


@dataclass
class Scan:
    """What one shard holds: its bytes and sha256, one dict of ``SCHEMA`` columns per sample, and its problems.

    ``final`` is False where another scan of the same bytes may find something else: the store failed, or the samples
    are in files beside the shard. ``passed_over`` is True for a file that is no shard.
    """

    name: str
    size: int = 0
    digest: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    final: bool = True
    passed_over: bool = False

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
