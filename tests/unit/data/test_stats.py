"""Statistics against figures counted by hand; samples are bounded and seeded, and of an image the head is read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus.data import stats as module
from isthmus.data.manifest import Manifest, index
from isthmus.data.stats import Copies, Spread, data_stats
from isthmus.data.transforms import DecodeError, decode_image, read_header
from isthmus.testing.shards import image_bytes, make_dataset, make_parquet, write_tar


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (width, height)), "JPEG", exif=exif)


@pytest.fixture
def hand_made(tmp_path: Path) -> str:
    """Five samples: three formats, a copy, a repeated caption, one without caption, one that is no image."""
    png = image_bytes(0, (30, 20))
    members = {
        "a.png": png, "a.txt": b"one two three\nfour five",
        "b.png": png, "b.txt": b"four five",
        "c.jpg": turned(40, 10), "c.txt": b"six",
        "d.webp": image_bytes(1, (8, 8), "WEBP"),
        "e.png": b"no image at all", "e.txt": b"six",
    }  # fmt: skip
    write_tar(tmp_path / "set" / "x.tar", members)
    index(str(tmp_path / "set"), captions="optional")
    return str(tmp_path / "set")


def test_figures_are_those_counted_by_hand(hand_made: str) -> None:
    found, values = data_stats(hand_made, count_tokens=lambda texts: [len(text) for text in texts])
    assert (found.samples, found.shards, found.images, found.without_caption, found.looked_at) == (5, 1, 5, 1, 5)
    assert (found.captions, found.distinct_captions) == (5, 3)
    assert found.most_repeated == [{"caption": "four five", "times": 2}, {"caption": "six", "times": 2}]
    assert sorted(values.words) == [1, 1, 2, 2, 3] and found.words.most == 3 and found.words.mean == 1.8
    assert found.tokens == Spread.of([len("one two three"), 9, 9, 3, 3])
    assert found.captions_per_sample == Spread.of([2, 1, 1, 0, 1])
    assert found.formats == {"PNG": 2, "JPEG": 1, "WEBP": 1}
    assert sorted((h.width, h.height) for h in values.headers) == [(8, 8), (10, 40), (30, 20), (30, 20)]
    assert (found.aspect.least, found.aspect.most) == (0.25, 1.5), "as displayed: the JPEG lies on its side"
    assert found.unreadable == 1 and found.reasons == {"the bytes are of no image format that is known": 1}
    assert found.duplicates == Copies(candidates=2, looked_at=2, copies=1, most=2)
    assert found.image_bytes.least == len(b"no image at all")
    assert found.tokens is not None and data_stats(hand_made)[0].tokens is None


def test_the_sample_is_bounded_and_follows_its_seed(tmp_path: Path) -> None:
    make_dataset(tmp_path, 40)
    make_parquet(tmp_path / "x.parquet", 10)
    index(str(tmp_path))
    first, one = data_stats(str(tmp_path), sample=12, seed=1)
    assert first == data_stats(str(tmp_path), sample=12, seed=1)[0]
    assert first.looked_at == 12 == len(set(one.rows)) and first.samples == 50
    assert one.rows != data_stats(str(tmp_path), sample=12, seed=2)[1].rows
    everything, values = data_stats(str(tmp_path), sample=1000)
    assert everything.looked_at == 50 and values.rows == list(range(50)) and everything.captions == 90
    assert everything.duplicates.copies == 10, "the Parquet file repeats ten images of the tars"


def test_copies_are_found_where_rows_drawn_at_random_would_miss_them(tmp_path: Path) -> None:
    """Two hundred images of lengths of their own, and two that are the same."""
    members = {f"{n:03d}.png": b"x" * (100 + n) for n in range(200)} | {"a.png": b"y" * 99, "b.png": b"y" * 99}
    write_tar(tmp_path / "x.tar", members)
    index(str(tmp_path), captions="optional")
    for seed in range(4):
        assert data_stats(str(tmp_path), sample=4, seed=seed)[0].duplicates == Copies(2, 2, 1, 2)


def test_whole_images_are_read_only_where_the_head_says_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    plain, profiled = encoded(noise, "JPEG"), encoded(noise, "JPEG", icc_profile=bytes(50_000))
    webp = encoded(noise, "WEBP", lossless=True)
    assert min(len(plain), len(profiled), len(webp)) > 2 * module.HEAD_BYTES
    write_tar(tmp_path / "x.tar", {"a.jpg": plain, "b.jpg": profiled, "c.webp": webp})
    index(str(tmp_path), captions="optional")
    asked: list[tuple[int, ...]] = []
    read = module.read_rows

    def noting(manifest: Manifest, rows: Any, head: int | None = None) -> Any:
        asked.extend((row, head or 0) for row in rows)
        return read(manifest, rows, head)

    monkeypatch.setattr(module, "read_rows", noting)
    found, values = data_stats(str(tmp_path))
    assert [(h.format, h.width, h.height) for h in values.headers] == [
        ("JPEG", 400, 300), ("JPEG", 400, 300), ("WEBP", 400, 300),
    ]  # fmt: skip
    assert found.unreadable == 0
    assert asked == [(n, module.HEAD_BYTES) for n in range(3)] + [(1, 0), (2, 0)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_header_says_what_decoding_gives(kind: str) -> None:
    data = image_bytes(0, (37, 21), kind)
    header = read_header(data)
    assert (header.width, header.height) == decode_image(data).size and header.format == kind
    sideways = turned(30, 7)
    assert (read_header(sideways).width, read_header(sideways).height) == decode_image(sideways).size == (7, 30)
    for broken in (b"", b"nothing", data[:2]):
        with pytest.raises(DecodeError):
            read_header(broken)


def test_spreads_of_nothing_and_of_something() -> None:
    assert Spread.of([]) == Spread()
    assert Spread.of([1, 2, 3, 4]) == Spread(2.5, 1, 1.15, 2.5, 3.85, 4)
