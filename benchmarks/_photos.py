"""Drawn photographs as tars: for a decoder they are what camera pictures are, with no file to download.

Natural images have a spectrum that falls with frequency and are made of surfaces that hide one another. So is each
picture here: clouds of 1/f noise for light and colour, and ellipses in front of them, each with a texture of its own.
At JPEG quality 88, 500 x 375 pixels take about 80 kB, as ImageNet's and VOC's do.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from isthmus.testing.shards import write_tar

SIZE = (500, 375)
QUALITY = 88
PER_SHARD = 128

_CANVAS = 1024
_CLOUDS = 12


def photo(number: int, size: tuple[int, int] = SIZE) -> bytes:
    """The JPEG file of picture ``number``; the same on every machine with the same libraries."""
    random = np.random.default_rng(number)
    width, height = size
    image_HWC = np.empty((height, width, 3), np.float32)
    light_HW, tints = _cut(random, size), [_cut(random, size), _cut(random, size)]
    mix_C2 = random.uniform(-14, 14, (3, 2))
    for channel, level in enumerate(random.uniform(70, 180, 3)):
        image_HWC[..., channel] = level + 38 * light_HW + sum(mix_C2[channel, n] * tints[n] for n in (0, 1))
    rows_H1, columns_1W = np.ogrid[:height, :width]
    for _ in range(random.integers(6, 14)):
        x, y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(15, 110)
        a, b = random.uniform(0.5, 1.5, 2)
        inside_HW = ((columns_1W - x) * a) ** 2 + ((rows_H1 - y) * b) ** 2 < radius**2
        texture_HW1 = _cut(random, size)[inside_HW][:, None]
        image_HWC[inside_HW] = random.uniform(20, 235, 3) + random.uniform(5, 40) * texture_HW1
    sink = io.BytesIO()
    Image.fromarray(np.clip(image_HWC, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


def write_photos(folder: Path, count: int, per_shard: int = PER_SHARD) -> Path:
    """Tars of ``count`` pictures, each with a caption and a JSON member, below ``folder``."""
    for first in range(0, count, per_shard):
        members = [member for number in range(first, min(count, first + per_shard)) for member in _members(number)]
        write_tar(folder / f"photos-{first // per_shard:05d}.tar", members)
    return folder


def _members(number: int) -> Iterator[tuple[str, bytes]]:
    key = f"photo{number:06d}"
    yield f"{key}.jpg", photo(number)
    yield f"{key}.json", json.dumps({"number": number, "width": SIZE[0], "height": SIZE[1]}).encode()
    yield f"{key}.txt", f"drawn picture number {number} of clouds and ellipses".encode()


def _cut(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A window of one of the clouds, mean about 0, deviation about 1, float32 [H, W]."""
    cloud = _clouds()[random.integers(_CLOUDS)]
    left, top = random.integers(0, _CANVAS - size[0] + 1), random.integers(0, _CANVAS - size[1] + 1)
    window: np.ndarray = cloud[top : top + size[1], left : left + size[0]]
    return window[:: random.choice((-1, 1)), :: random.choice((-1, 1))]


@functools.cache
def _clouds() -> np.ndarray:
    """Noise whose amplitude falls as 1/f, float32 [clouds, 1024, 1024]."""
    random = np.random.default_rng(0)
    across, down = np.fft.rfftfreq(_CANVAS)[None], np.fft.fftfreq(_CANVAS)[:, None]
    frequency = np.maximum(np.hypot(across, down), 1 / _CANVAS)
    clouds = np.empty((_CLOUDS, _CANVAS, _CANVAS), np.float32)
    for cloud in clouds:
        phase = random.standard_normal((2, *frequency.shape))
        noise = np.fft.irfft2((phase[0] + 1j * phase[1]) / frequency ** random.uniform(0.9, 1.2), s=cloud.shape)
        cloud[...] = (noise - noise.mean()) / noise.std()
    return clouds
