"""Training pixels in two steps: uint8 while they travel, a quarter of the bytes, and float32 where a batch is made.

Shape letters: B rows, C channels (3), H height, W width, S side of the square that the model takes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from isthmus.config import DataConfig
from isthmus.contracts import Stage
from isthmus.data.transforms import Box, ImageTransform

_TORCH = ("bilinear", "bicubic")
"""Interpolations that torch computes on bytes, with antialiasing."""


class BatchMemory:
    """float32 arrays that are filled anew when nobody has them any more.

    A batch is as large as what the system hands out page by page, each filled with zeros first, and takes back at once.
    Whether an array is free is seen by its references: every view and tensor of it holds one.

    Args:
        most: arrays that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most, self._kept, self._lock = most, list[np.ndarray](), threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array that nobody else has, its contents left over."""
        with self._lock:
            for number in range(len(self._kept)):
                # The list's own reference, and that of the call.
                if self._kept[number].shape == shape and sys.getrefcount(self._kept[number]) == 2:
                    return self._kept[number]
            made = np.empty(shape, np.float32)
            self._kept = [*self._kept, made][-self._most :]
            return made


@dataclass(frozen=True)
class TrainingPixels:
    """What an image becomes in training. Picklable; a function of (image, seed) alone.

    Attributes:
        transform: crop, size and normalisation.
        augment: False takes the plain image, resized by Pillow as for evaluation and caches.
        resize: what makes a crop's pixels. ``torch`` takes a quarter of the time of ``pillow``. It rounds its weights
            to 16 bits, and so one pixel of a hundred is a level of 255 apart, two where an image is enlarged. And it
            sees the crop alone, as torchvision's RandomResizedCrop does, where Pillow also weighs in the pixels around
            it: more levels along the edges.
    """

    transform: ImageTransform
    augment: bool = True
    resize: Literal["torch", "pillow"] = "torch"

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        """uint8 [S, S, 3] of an RGB image."""
        if not self.augment:
            return self.transform.resized(image)
        crop = self.transform.draw(image.size, seed)
        if self.resize == "torch" and self.transform.interpolation in _TORCH:
            return crop.finish(resized_by_torch(image, crop.box, self.transform.size, self.transform.interpolation))
        return crop.finish(self.transform.resized(image, crop.box))

    def finish(self, pixels: Sequence[np.ndarray | None], memory: BatchMemory | None = None) -> np.ndarray:
        """float32 [B, 3, S, S] of B such images, in memory that is used again where some is given."""
        shape = (len(pixels), 3, self.transform.size, self.transform.size)
        out_BCHW = np.empty(shape, np.float32) if memory is None else memory.empty(shape)
        for pixels_HWC, out_CHW in zip(pixels, out_BCHW, strict=True):
            assert pixels_HWC is not None
            self.transform.normalised(pixels_HWC, out_CHW)
        return out_BCHW


def training_pixels(stage: Stage, data: DataConfig) -> TrainingPixels | None:
    """The two steps of the stage's training transform; None where it has one of its own making, which gives floats."""
    transform: Any = stage.transform
    if not isinstance(transform, ImageTransform) or (data.augment and stage.augment != transform.augment):
        return None
    return TrainingPixels(drawing(transform, data), data.augment, data.resize)


def drawing(transform: ImageTransform, data: DataConfig) -> ImageTransform:
    """The transform with crops, flips and changes as the recipe has them drawn; evaluation pixels stay the same."""
    return replace(transform, crop_scale=data.crop, flip=data.flip, rand_augment=data.rand_augment)


def resized_by_torch(image: Image.Image, box: Box, size: int, interpolation: str) -> np.ndarray:
    """``box`` of an RGB image as uint8 [size, size, 3]; what lies outside of it does not count."""
    left, top, right, bottom = box
    # Copied by NumPy, for torch would copy it with threads of its own beside those that decode.
    crop_HWC = _pixels_of(image)[top:bottom, left:right].copy()
    crop_1CHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None]
    out_1CHW = torch.nn.functional.interpolate(crop_1CHW, size=(size, size), mode=interpolation, antialias=True)
    out_HWC: np.ndarray = out_1CHW[0].permute(1, 2, 0).numpy()
    return out_HWC[..., :3]


def _pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 4] that Pillow holds itself, the last byte of a pixel unused; a copy [H, W, 3] of images so large
    that it holds them in pieces."""
    import pyarrow as pa

    try:
        values = pa.array(image).values
    except ValueError:
        return np.asarray(image)
    return np.frombuffer(values.buffers()[1], np.uint8).reshape(image.height, image.width, 4)
