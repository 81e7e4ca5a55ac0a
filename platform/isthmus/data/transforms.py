"""Image bytes to pixels, with guards, and captions to clean text.

Shape letters: C channels (3), H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from isthmus.data.randaugment import Change, changed, draw_changes

MAX_PIXELS = 40_000_000
"""Larger images are refused from their header: a small file can name a size that exhausts the memory."""

MAX_BYTES = 128 << 20
"""Larger image files are refused unread: more than the pixels themselves would take at the limit."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded. PIL knows forty more, and some of those run other programs (EPS) or nest images in one another."""

_ORIENTATION = 0x0112

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class DecodeError(Exception):
    """An image that cannot be decoded; ``reason`` is one sentence without the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What an image's header says: PIL's name of the format, and the size in pixels as displayed."""

    format: str
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Format and size of an image, from its first bytes; no pixel is decoded.

    Raises:
        DecodeError: empty, unknown format, no area, or the header is not whole.
    """
    with _decoding(data, MAX_PIXELS):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = image.size[::-1] if turned else image.size
        if width < 1 or height < 1:
            raise DecodeError(f"the image has no area ({width}x{height})")
        return Header(str(image.format), width, height)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """An RGB image of the bytes of one of :data:`FORMATS`.

    The header is checked before pixels are allocated. EXIF orientation is applied, alpha is laid onto white, CMYK,
    palette, 16-bit and float greys are converted, the first frame of an animation is taken, profiles are ignored.

    Args:
        data: the file's bytes.
        max_pixels: width x height above which the image is refused.
        at_least: where given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay at least
            twice this many pixels: three times as fast on photographs, and what follows resamples it anyway.

    Raises:
        DecodeError: empty, unknown format, too large, cut short or damaged.
    """
    with _decoding(data, max_pixels):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width < 1 or height < 1:
            raise DecodeError(f"the image has no area ({width}x{height})")
        if width * height > max_pixels:
            raise DecodeError(f"the image of {width}x{height} pixels is larger than the limit of {max_pixels}")
        if at_least and image.format in ("JPEG", "MPO"):  # a camera's JPEG with a preview behind it is an MPO
            image.draft("RGB", (min(width, 2 * at_least), min(height, 2 * at_least)))
        image.seek(0)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies the many that need not be turned
        return _rgb(image)


@contextmanager
def _decoding(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turns whatever a decoder raises into a :class:`DecodeError`."""
    if not data:
        raise DecodeError("the image is empty")
    if len(data) > MAX_BYTES:
        raise DecodeError(f"the image of {len(data)} bytes is larger than the limit of {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a decompression-bomb warning is our own check
            yield
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("the bytes are of no image format that is known") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the image is larger than the limit of {max_pixels} pixels") from None
    except Exception as error:  # decoders raise a wide range on hostile bytes: OSError, SyntaxError, struct.error, ...
        raise DecodeError(f"the image is damaged: {str(error) or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # deep greys; PIL's own conversion clips them to white
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535.0 if image.mode.startswith("I;16") else _white(values.max(initial=0), image.mode)
        image = Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8), mode="L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _white(largest: float, mode: str) -> float:
    """The value of white where the mode does not say it: floats are shares, bytes or 16-bit values by their range."""
    if mode == "F" and largest <= 1:
        return 1.0
    return 255.0 if largest <= 255 else 65535.0


Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a crop, in pixels."""


@dataclass(frozen=True)
class Crop:
    """What was drawn for a training image: the part that is kept, whether it is mirrored left to right, and how it is
    changed then."""

    box: Box
    mirror: bool
    changes: tuple[Change, ...] = ()

    def finish(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """The resized part's uint8 pixels, mirrored and changed."""
        return changed(pixels_HWC[:, ::-1] if self.mirror else pixels_HWC, self.changes)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, scale to [0, 1], normalise. Picklable; two equal ones give equal pixels.

    Evaluation resizes to size x size without keeping the aspect; training takes a random resized crop and a flip
    (the seeds' pre-processing: BLIP-2's released configuration), and RandAugment where it is asked for.

    Attributes:
        size: pixels of the square output.
        mean, std: per channel, in [0, 1].
        interpolation: nearest, bilinear, bicubic or lanczos.
        crop_scale: smallest and largest share of the area that a training crop covers.
        flip: whether training mirrors half of the images.
        rand_augment: number and magnitude (of ten) of RandAugment's operations in training; None: none.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    rand_augment: tuple[int, int] | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Evaluation pixels, float32 [3, size, size]."""
        return self.normalised(self.resized(image))

    def augment(self, image: Image.Image, seed: int) -> np.ndarray:
        """Training pixels, float32 [3, size, size]; the same for the same image and seed."""
        crop = self.draw(image.size, seed)
        return self.normalised(crop.finish(self.resized(image, crop.box)))

    def draw(self, size: tuple[int, int], seed: int) -> Crop:
        """The training crop of an image of ``size`` (width, height)."""
        random = np.random.Generator(np.random.Philox(seed & ((1 << 64) - 1)))
        box = _random_box(size, self.crop_scale, random)
        mirror = self.flip and random.random() < 0.5
        return Crop(box, mirror, draw_changes(random, *self.rand_augment) if self.rand_augment else ())

    def resized(self, image: Image.Image, box: Box | None = None) -> np.ndarray:
        """``box`` of the image, or all of it, as uint8 [size, size, 3]; pixels around the box count at its edges."""
        out = image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box)
        return np.asarray(out if out.mode == "RGB" else out.convert("RGB"))

    def normalised(self, pixels_HWC: np.ndarray, out_CHW: np.ndarray | None = None) -> np.ndarray:
        """uint8 [H, W, 3] as the model takes it, float32 [3, H, W], written to ``out_CHW`` where that is given."""
        mean_C11, std_C11 = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        if out_CHW is None:
            out_CHW = np.empty((3, *pixels_HWC.shape[:2]), np.float32)
        # Cast first and by itself: a product of both types goes through buffers, which takes half as long again.
        np.copyto(out_CHW, pixels_HWC.transpose(2, 0, 1))
        np.multiply(out_CHW, 1.0 / (255.0 * std_C11), out=out_CHW)
        return np.subtract(out_CHW, mean_C11 / std_C11, out=out_CHW)

    @property
    def least_side(self) -> int:
        """Pixels that ``at_least`` of :func:`decode_image` has to leave, so that small crops too are of real pixels."""
        return math.ceil(self.size * max(1.0, (0.5 / self.crop_scale[0]) ** 0.5))

    @property
    def digest(self) -> str:
        """sha256 of what decides the evaluation pixels and the crops."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """The attributes by name; ``rand_augment``, which came later, only where it is there."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _random_box(size: tuple[int, int], scale: tuple[float, float], random: np.random.Generator) -> Box:
    """A crop of a random share of the area and an aspect between 3/4 and 4/3 (Szegedy et al., 2015; torchvision's
    RandomResizedCrop: ten tries, then the centre)."""
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = float(np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3))))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


_MARKS = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text: str, max_words: int = 50) -> str:
    """The seeds' caption processor: lower case, each of ``. ! " ( ) * # : ; ~`` a space, white space collapsed, at most
    ``max_words`` words (LAVIS, BlipCaptionProcessor)."""
    return " ".join(_MARKS.sub(" ", text.lower()).split()[:max_words])
