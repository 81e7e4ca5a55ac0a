"""RandAugment: a few random changes of colour or geometry, all of one magnitude (Cubuk et al. 2020).

The ten operations, their strengths and the even chance of each are those of vision-language pre-training (ALBEF's
training code, which BLIP and the projectors' recipe use): none of them inverts, solarises or turns the hue. Equalising
and stretching the contrast work on each channel, though: drawings of few colours may change those that their captions
name. Pillow computes them; nothing here has a random state of its own.

Shape letters: S side of a square image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LARGEST = 10
"""The magnitude of the strongest change."""

_GREY = (128, 128, 128)
_Op = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """What ``matrix`` makes of the place of each pixel: the place in ``image`` where it comes from; grey outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY)


_PLAIN: dict[str, _Op] = {
    "identity": lambda image, _: image,
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, share: ImageEnhance.Brightness(image).enhance(1.8 * share + 0.1),
    "sharpness": lambda image, share: ImageEnhance.Sharpness(image).enhance(1.8 * share + 0.1),
}
"""Operations of a strength in [0, 1]."""

_SIGNED: dict[str, _Op] = {
    "shear_x": lambda image, share: _affine(image, (1, 0.3 * share, 0, 0, 1, 0)),
    "shear_y": lambda image, share: _affine(image, (1, 0, 0, 0.3 * share, 1, 0)),
    "translate_x": lambda image, share: _affine(image, (1, 0, 10 * share, 0, 1, 0)),
    "translate_y": lambda image, share: _affine(image, (1, 0, 0, 0, 1, 10 * share)),
    "rotate": lambda image, share: image.rotate(30 * share, Image.Resampling.BILINEAR, fillcolor=_GREY),
}
"""Operations of a strength in [-1, 1]: either way. Shifts are of pixels, at most ten."""

OPERATIONS = {**_PLAIN, **_SIGNED}
CHANCE = 0.5
"""That an operation which was drawn is applied."""


@dataclass(frozen=True)
class Change:
    """An operation of :data:`OPERATIONS` and its strength, a share of the strongest; below 0 the other way."""

    name: str
    share: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """The changed image, of the same size and mode."""
        return OPERATIONS[self.name](image, self.share)


def draw_changes(random: np.random.Generator, count: int, magnitude: int) -> tuple[Change, ...]:
    """``count`` operations, each kept with :data:`CHANCE`, at ``magnitude`` of :data:`LARGEST`, either way where there
    are two."""
    names, share = list(OPERATIONS), magnitude / LARGEST
    drawn = []
    for number in random.integers(0, len(names), count).tolist():
        kept, sign = random.random(2) < (CHANCE, 0.5)
        if kept:
            drawn.append(Change(names[number], -share if sign and names[number] in _SIGNED else share))
    return tuple(drawn)


def changed(pixels_SSC: np.ndarray, changes: tuple[Change, ...]) -> np.ndarray:
    """uint8 [S, S, 3] after the changes, one upon the other."""
    if not changes:
        return pixels_SSC
    image = Image.fromarray(np.ascontiguousarray(pixels_SSC))
    for change in changes:
        image = change(image)
    return np.asarray(image)
