"""A data set as one HTML page: its figures, their distributions, and pictures with their captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from isthmus import storage
from isthmus.data.clips import picture_of
from isthmus.data.manifest import Manifest
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.stats import DataStats, Spread, Values
from isthmus.data.transforms import DecodeError
from isthmus.pipeline.page import render, thumbnail
from isthmus.pipeline.plots import bars, histogram

CARDS = 48
_LONGEST = 300  # characters of a caption on the sheet


def write_page(url: str, stats: DataStats, values: Values) -> None:
    """Write the page of what :func:`isthmus.data.stats.data_stats` found to ``url``."""
    page = render(
        "dataset.html",
        title=f"Isthmus: {stats.url}",
        lead="What the data set holds: counts of its manifest, and a seeded sample of its captions and images.",
        tiles=list(_tiles(stats)),
        plots=list(_plots(values)),
        cards=list(_cards(stats.url, values.rows)),
        stats=stats,
        spreads={name: astuple(spread) for name, spread in _spreads(stats).items()},
    )
    storage.write_bytes(url, page.encode())


def _tiles(stats: DataStats) -> Iterator[dict[str, str]]:
    yield _tile("samples", f"{stats.samples:,}", f"{stats.shards:,} shards, {stats.shard_bytes / 1e6:,.1f} MB")
    yield _tile("images", f"{stats.images:,}", "as far as image_id tells them apart")
    without = stats.without_caption
    yield _tile("without caption", f"{without:,}", f"{without / stats.samples:.1%} of all", without == 0)
    shown = f"{stats.distinct_captions:,} of {stats.captions:,}"
    yield _tile("distinct captions", shown, f"in {stats.looked_at:,} samples looked at")
    yield _tile("unreadable", f"{stats.unreadable:,}", f"of {stats.looked_at:,} looked at", stats.unreadable == 0)
    copies = stats.duplicates
    share = "all" if copies.looked_at == copies.candidates else f"{copies.looked_at:,}"
    note = f"in {share} of {copies.candidates:,} images that share their size in bytes"
    yield _tile("copies of images", f"{copies.copies:,}", note)


def _tile(name: str, value: str, note: str, met: bool | None = None) -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "state": {None: "", True: "met", False: "missed"}[met]}


def _plots(values: Values) -> Iterator[str]:
    yield histogram("Length of captions", {"words": values.words, "tokens": values.tokens}, _units(values))
    yield histogram("Captions of a sample", {"captions": values.captions_per_sample}, "captions")
    if values.headers:
        sides = {"width": [h.width for h in values.headers], "height": [h.height for h in values.headers]}
        yield histogram("Size of images", sides, "pixels, as displayed", log=True)
        yield histogram("Aspect of images", {"aspect": [h.width / h.height for h in values.headers]}, "width by height")
        formats = dict.fromkeys(sorted({h.format for h in values.headers}), 0.0)
        for header in values.headers:
            formats[header.format] += 100 / len(values.headers)
        yield bars("Formats", {"images": formats})
    sizes = values.image_bytes[values.image_bytes > 0]
    if len(sizes):
        yield histogram("Size of image files", {"bytes": sizes.tolist()}, "bytes", log=True)


def _units(values: Values) -> str:
    return "words and tokens" if values.tokens else "words"


def _cards(url: str, rows: list[int]) -> Iterator[dict[str, Any]]:
    manifest = Manifest.load(url)
    shown = rows[:: max(1, len(rows) // CARDS)][:CARDS]
    for row, found in zip(shown, read_rows(manifest, shown), strict=True):
        card = {"key": found.key, "src": "", "caption": "", "note": found.key}
        if isinstance(found, RawSample):
            text = found.captions[0] if found.captions else ""
            card["caption"] = text[:_LONGEST] + ("…" if len(text) > _LONGEST else "")
            try:
                image = picture_of(found, at_least=160)
                card["note"] = f"{found.key}, row {row}"
                card["src"] = thumbnail(image)
            except DecodeError as error:
                card["note"] = f"{found.key}: {error.reason}"
        else:
            card["note"] = f"{found.key}: {found.reason}"
        yield card


def _spreads(stats: DataStats) -> dict[str, Spread]:
    named = {
        "words of a caption": stats.words,
        "tokens of a caption": stats.tokens,
        "captions of a sample": stats.captions_per_sample,
        "width, pixels": stats.width,
        "height, pixels": stats.height,
        "width by height": stats.aspect,
        "bytes of an image": stats.image_bytes,
    }
    return {name: spread for name, spread in named.items() if spread is not None}
