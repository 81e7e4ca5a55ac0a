"""Training pixels: the fast way against the plain one, and what travels as bytes against what is made at once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.config import DataConfig
from isthmus.contracts import Sample, Stage, StageModule
from isthmus.data.pixels import BatchMemory, TrainingPixels, resized_by_torch, training_pixels
from isthmus.data.transforms import ImageTransform
from isthmus.methods.batching import stack

SIZE = 64


def picture(width: int = 150, height: int = 110, seed: int = 0) -> Image.Image:
    """Noise on a slope: every level and hard edges, the worst that a resize can meet."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    pixels = np.where(random.random((height, width, 1)) < 0.5, slope, random.integers(0, 256, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("box", "levels"), [((0, 0, 150, 110), 1), ((7, 3, 131, 99), 1), ((20, 10, 60, 40), 2), ((5, 5, 9, 8), 2)]
)
def test_torch_resizes_as_pillow_does(box: Any, levels: int, interpolation: Any) -> None:
    """Torch's weights have 16 bits, Pillow's 22: a sum near a half may round to the other side, in each of the two
    directions, and where an image is enlarged the second direction's weights may make two levels of it."""
    fast = resized_by_torch(picture(), box, SIZE, interpolation).astype(int)
    plain = ImageTransform(SIZE, interpolation=interpolation).resized(picture().crop(box)).astype(int)
    assert fast.shape == plain.shape == (SIZE, SIZE, 3)
    assert np.abs(fast - plain).max() <= levels and (fast != plain).mean() < 0.05


def test_fast_crops_are_the_plain_ones_but_for_the_edges() -> None:
    transform = ImageTransform(SIZE, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))  # levels of 255
    for seed in range(8):
        fast = transform.normalised(TrainingPixels(transform)(picture(), seed))
        plain = transform.augment(picture(), seed)
        assert np.abs(fast - plain)[:, 5:-5, 5:-5].max() <= 1.001
        assert np.abs(fast - plain[:, :, ::-1]).mean() > 10  # the mirrored one is another picture


def test_the_plain_way_is_taken_where_it_is_asked_for_or_the_only_one() -> None:
    transform = ImageTransform(SIZE)
    lanczos = replace(transform, interpolation="lanczos")
    for pixels, expected in (
        (TrainingPixels(transform, resize="pillow"), transform.augment(picture(), 3)),
        (TrainingPixels(lanczos), lanczos.augment(picture(), 3)),
        (TrainingPixels(transform, augment=False), transform(picture())),
    ):
        found = pixels(picture(), 3)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(pixels)).finish([found])[0], expected)


def test_normalising_bytes_is_the_formula_bit_for_bit() -> None:
    transform = ImageTransform(16)
    levels_HWC = np.arange(16 * 16 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    mean, std = np.asarray(transform.mean, np.float32), np.asarray(transform.std, np.float32)
    expected_HWC = levels_HWC.astype(np.float32) * (1.0 / (255.0 * std)) - mean / std
    found_CHW = transform.normalised(levels_HWC)
    assert found_CHW.flags.c_contiguous and found_CHW.dtype == np.float32
    np.testing.assert_array_equal(found_CHW, expected_HWC.transpose(2, 0, 1))


def test_an_image_that_pillow_holds_in_pieces() -> None:
    """Above 16 MiB its rows lie in several blocks, which cannot be looked at as one array."""
    large = Image.new("RGB", (2400, 2000), (10, 20, 30))
    large.paste((200, 100, 50), (0, 1990, 2400, 2000))
    found = resized_by_torch(large, (100, 1900, 300, 2000), 20, "bilinear")
    assert found[0, 0].tolist() == [10, 20, 30] and found[-1, 0].tolist() == [200, 100, 50]


def test_a_transform_of_a_methods_own_making_is_left_alone() -> None:
    transform = ImageTransform(SIZE)
    stage = Stage(StageModule(), lambda *_: None, transform, transform.augment, lambda _: {}, (), {})  # type: ignore
    assert training_pixels(stage, DataConfig(train="x")) == TrainingPixels(transform)
    assert training_pixels(stage, DataConfig(train="x", resize="pillow")) == TrainingPixels(transform, True, "pillow")
    own = replace(stage, augment=lambda image, seed: np.zeros((3, SIZE, SIZE), np.float32))
    assert training_pixels(own, DataConfig(train="x")) is None
    assert training_pixels(own, DataConfig(train="x", augment=False)) == TrainingPixels(transform, False)


def test_rows_of_one_array_are_a_batch_without_a_copy() -> None:
    whole = np.arange(4 * 3 * 2 * 2, dtype=np.float32).reshape(4, 3, 2, 2).copy()
    rows = [Sample(n, str(n), pixels_CHW=whole[n]) for n in range(4)]
    pixels = stack(rows, 0, 0)["pixels_BCHW"]
    assert pixels.data_ptr() == whole.ctypes.data and torch.equal(pixels, torch.from_numpy(whole))
    for other in ([1, 0, 2, 3], [0, 1, 2], [0, 1, 2, 2]):  # another order, a part, a repeated row
        pixels = stack([rows[n] for n in other], 0, 0)["pixels_BCHW"]
        assert not np.shares_memory(pixels.numpy(), whole) and torch.equal(pixels, torch.from_numpy(whole[other]))
    mirrored = [replace(row, pixels_CHW=row.pixels_CHW[:, :, ::-1]) for row in rows]  # type: ignore[index]
    assert torch.equal(stack(mirrored, 0, 0)["pixels_BCHW"], torch.from_numpy(whole[..., ::-1].copy()))


def test_memory_is_used_again_only_when_nobody_has_it() -> None:
    memory = BatchMemory(most=2)
    first = memory.empty((4, 2))
    place, tensor, row = first.ctypes.data, torch.from_numpy(first), first[1]
    del first
    assert memory.empty((4, 2)).ctypes.data != place, "a tensor and a row have it"
    del tensor
    assert memory.empty((4, 2)).ctypes.data != place, "a row has it"
    memory = BatchMemory(most=2)
    place = memory.empty((4, 2)).ctypes.data
    assert memory.empty((4, 3)).ctypes.data != place, "it has another shape"
    assert memory.empty((4, 2)).ctypes.data == place
    held = [memory.empty((4, 2)) for _ in range(5)]
    assert len({array.ctypes.data for array in held}) == 5
    del row


def test_a_batch_in_used_memory_is_the_same() -> None:
    transform = ImageTransform(SIZE)
    pixels, memory = TrainingPixels(transform), BatchMemory(most=1)
    rows = [[pixels(picture(seed=seed), seed) for seed in range(start, start + 3)] for start in (0, 3)]
    for some in rows:
        assert np.array_equal(pixels.finish(some, memory), pixels.finish(some))
