"""What a data set holds, in figures: counts of its manifest, and of a bounded, seeded sample of its rows the captions,
the images' headers and the copies among them. No image is decoded for the figures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from isthmus.data.manifest import Manifest
from isthmus.data.media import clip_header
from isthmus.data.readers import Failure, RawSample, read_rows
from isthmus.data.records import VIDEO_KINDS
from isthmus.data.transforms import DecodeError, Header, read_header
from isthmus.progress import progress

HEAD_BYTES = 32 << 10
"""Of an image; its size stands there, unless a preview or a colour profile comes before it."""

_REPEATED = 5


@dataclass(frozen=True)
class Spread:
    """How values lie; all zero where there are none."""

    mean: float = 0.0
    least: float = 0.0
    p05: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Of a list of numbers."""
        if not len(values):
            return cls()
        least, p05, median, p95, most = np.percentile(np.asarray(values, np.float64), [0, 5, 50, 95, 100])
        return cls(*(round(float(v), 3) for v in (np.mean(values), least, p05, median, p95, most)))


@dataclass(frozen=True)
class Copies:
    """Images whose bytes are those of another one. Only images of equally many bytes can be.

    Attributes:
        candidates: images that share their number of bytes with another one.
        looked_at: of them these were read and compared; where it is all of them, the count is that of the data set.
        copies: images that are the same as one before.
        most: samples that share the image that occurs most often.
    """

    candidates: int
    looked_at: int
    copies: int
    most: int


@dataclass(frozen=True)
class DataStats:
    """What :func:`data_stats` found. The first group is exact; what follows ``looked_at`` is of that many samples.

    Attributes:
        images: distinct images, as far as ``image_id`` names them.
        clips, sounds: samples with a clip in an image's place, and with a sound file of their own.
        shard_bytes: all shards together.
        image_bytes: of each encoded image; 0 is left out, where the index could not tell.
        looked_at, seed: samples drawn, and the seed they were drawn with.
        unreadable: of them; with the reasons.
        captions: those of the samples looked at; ``distinct_captions`` among them, and the most repeated.
        words, tokens: of a caption; tokens without special ones, where a tokenizer was named.
        width, height: pixels as displayed, after EXIF orientation; ``aspect`` is width by height.
    """

    url: str
    digest: str
    samples: int
    shards: int
    images: int
    shard_bytes: int
    without_caption: int
    image_bytes: Spread
    looked_at: int
    seed: int
    unreadable: int
    reasons: dict[str, int]
    captions: int
    captions_per_sample: Spread
    distinct_captions: int
    most_repeated: list[dict[str, Any]]
    words: Spread
    tokens: Spread | None
    formats: dict[str, int]
    width: Spread
    height: Spread
    aspect: Spread
    duplicates: Copies
    clips: int = 0
    sounds: int = 0


@dataclass
class Values:
    """The samples looked at, value by value, for plots. ``rows`` are manifest row numbers; ``readable`` those of them
    whose header could be read."""

    rows: list[int] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    captions_per_sample: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    image_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    reasons: Counter[str] = field(default_factory=Counter)


def data_stats(
    url: str, *, sample: int = 2000, seed: int = 0, count_tokens: Callable[[list[str]], list[int]] | None = None
) -> tuple[DataStats, Values]:
    """Figures of an indexed data set, and the values behind them.

    Args:
        url: the indexed folder.
        sample: at most so many samples are read, and as many images are compared.
        seed: of the sample.
        count_tokens: texts -> number of tokens of each.

    Raises:
        DataError: not indexed, or changed since.
        StorageError: the folder cannot be read.
    """
    manifest = Manifest.load(url)
    random = np.random.default_rng(seed)
    drawn = np.sort(random.choice(len(manifest), min(sample, len(manifest)), replace=False, shuffle=False))
    values = _look(manifest, drawn.tolist())
    values.image_bytes = manifest.image_bytes
    values.words = [len(text.split()) for text in values.captions]
    if count_tokens is not None and values.captions:
        values.tokens = count_tokens(values.captions)
    times = Counter(values.captions)
    stats = DataStats(
        url=url,
        digest=manifest.digest,
        samples=len(manifest),
        shards=len(manifest.shards),
        images=len(np.unique(manifest.image_ids)),
        shard_bytes=sum(shard.size for shard in manifest.shards),
        without_caption=len(manifest) - manifest.captioned,
        image_bytes=Spread.of(values.image_bytes[values.image_bytes > 0]),
        looked_at=len(drawn),
        seed=seed,
        unreadable=sum(values.reasons.values()),
        reasons=dict(values.reasons.most_common()),
        captions=len(values.captions),
        captions_per_sample=Spread.of(values.captions_per_sample),
        distinct_captions=len(times),
        most_repeated=[{"caption": text, "times": n} for text, n in times.most_common(_REPEATED) if n > 1],
        words=Spread.of(values.words),
        tokens=Spread.of(values.tokens) if count_tokens is not None else None,
        formats=dict(Counter(header.format for header in values.headers).most_common()),
        width=Spread.of([header.width for header in values.headers]),
        height=Spread.of([header.height for header in values.headers]),
        aspect=Spread.of([header.width / header.height for header in values.headers]),
        duplicates=_copies(manifest, values.image_bytes, sample, random),
        **_heard(manifest),
    )
    return stats, values


def _heard(manifest: Manifest) -> dict[str, int]:
    """Numbers of clips and of sound files."""
    kinds = pc.value_counts(manifest.rows.whole(["image_ext"])["image_ext"]).to_pylist()
    clips = sum(kind["counts"] for kind in kinds if kind["values"] in VIDEO_KINDS)
    sounds = int((manifest.rows.column("audio_length") >= 0).sum()) if manifest.knows_sounds else 0
    return {"clips": clips, "sounds": sounds}


def _look(manifest: Manifest, rows: list[int]) -> Values:
    values, whole = Values(rows=rows), []
    headers: dict[int, Header | str] = {}
    with progress("Looking", total=len(rows)) as tracker:
        for row, found in zip(rows, read_rows(manifest, rows, head=HEAD_BYTES), strict=True):
            if isinstance(found, RawSample):
                values.captions += found.captions
                values.captions_per_sample.append(len(found.captions))
            headers[row] = _header(found)
            if isinstance(headers[row], Header):
                tracker.advance()
            else:
                whole.append(row)
        for row, found in zip(whole, read_rows(manifest, whole), strict=True):  # the head said too little
            headers[row] = _header(found)
            tracker.advance()
    for row, header in headers.items():
        if isinstance(header, Header):
            values.readable.append(row)
            values.headers.append(header)
        else:
            values.reasons[header.partition(":")[0]] += 1
    return values


def _header(found: RawSample | Failure) -> Header | str:
    if isinstance(found, Failure):
        return found.reason
    try:
        return clip_header(found.image) if found.kind in VIDEO_KINDS else read_header(found.image)
    except DecodeError as error:
        return error.reason


def _copies(manifest: Manifest, lengths: np.ndarray, most: int, random: np.random.Generator) -> Copies:
    """Copies among the images of equal length. A sample of rows would hardly ever hold both of two copies, so whole
    groups of one length are drawn instead, until there are ``most`` rows."""
    _, group_of, size_of = np.unique(lengths, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(size_of[group_of] > 1)
    place_of = random.permutation(len(size_of))[group_of[candidates]]
    rows = np.sort(candidates[np.argsort(place_of, kind="stable")][:most])
    digests: Counter[bytes] = Counter()
    with progress("Comparing", total=len(rows), unit="images") as tracker:
        for found in read_rows(manifest, rows):
            tracker.advance()
            if isinstance(found, RawSample):
                digests[hashlib.sha256(found.image).digest()] += 1
    copies = sum(digests.values()) - len(digests)
    return Copies(len(candidates), len(rows), copies, max(digests.values(), default=0) if copies else 0)
