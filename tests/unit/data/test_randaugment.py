"""RandAugment: what each operation does, worked out by hand or by torch, and how operations are drawn."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from isthmus.compat import ensure_torchvision
from isthmus.config import DataConfig
from isthmus.data.pixels import TrainingPixels, drawing, resized_by_torch
from isthmus.data.randaugment import _SIGNED, OPERATIONS, Change, changed, draw_changes
from isthmus.data.transforms import ImageTransform, decode_image

S = 64
GREY = 128


def picture(seed: int = 0) -> np.ndarray:
    """A smooth colour picture of a middling contrast, uint8 [S, S, 3]."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(40, 200, (6, 6, 3)).astype(np.uint8))
    return np.asarray(small.resize((S, S), Image.Resampling.BICUBIC))


def after(name: str, share: float, pixels: np.ndarray | None = None) -> np.ndarray:
    return changed(picture() if pixels is None else pixels, (Change(name, share),)).astype(int)


def test_a_shift_moves_the_picture_by_whole_pixels_and_fills_with_grey() -> None:
    image = picture().astype(int)
    assert np.array_equal(after("translate_x", 0.7)[:, :-7], image[:, 7:])
    assert (after("translate_x", 0.7)[:, -6:] == GREY).all()
    assert np.array_equal(after("translate_x", -0.7)[:, 7:], image[:, :-7])
    assert np.array_equal(after("translate_y", 1.0)[:-10], image[10:])
    assert (after("translate_y", 1.0)[-9:] == GREY).all()
    assert np.array_equal(after("translate_y", -1.0)[10:], image[:-10])


@pytest.mark.parametrize("share", [0.7, -0.4])
def test_a_shear_shifts_each_row_or_column_by_its_distance(share: float) -> None:
    place = np.arange(S)
    slope = np.repeat((3 * place)[None, :, None], S, 0).repeat(3, 2).astype(np.uint8)  # 3 levels a pixel to the right
    x, y = np.meshgrid(place + 0.5, place + 0.5)
    came_from = x + 0.3 * share * y
    inside = (came_from > 1) & (came_from < S - 1)
    error = after("shear_x", share, slope)[..., 0] - 3 * (came_from - 0.5)
    assert np.abs(error[inside]).max() <= 1 and inside.mean() > 0.6
    sheared = after("shear_y", share, slope.transpose(1, 0, 2))
    assert np.array_equal(sheared, after("shear_x", share, slope).transpose(1, 0, 2))


def test_other_operations_are_torchs_own() -> None:
    ensure_torchvision()
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as theirs

    image = torch.from_numpy(picture().copy()).permute(2, 0, 1)
    middle = (slice(18, -18), slice(18, -18))
    turned = theirs.rotate(image, 21.0, InterpolationMode.BILINEAR)
    for name, share, expected, levels in (
        ("identity", 0.7, image, 0),
        ("auto_contrast", 0.7, theirs.autocontrast(image), 1),
        ("equalize", 0.7, theirs.equalize(image), 1),
        ("brightness", 0.7, theirs.adjust_brightness(image, 1.36), 1),
        ("brightness", 0.1, theirs.adjust_brightness(image, 0.28), 1),
        ("sharpness", 0.7, theirs.adjust_sharpness(image, 1.36), 1),
        ("rotate", 0.7, turned, 2),
    ):
        apart = np.abs(after(name, share) - expected.permute(1, 2, 0).numpy().astype(int))
        assert (apart[middle] if name == "rotate" else apart).max() <= levels, name
        assert name == "identity" or np.abs(after(name, share) - picture().astype(int)).mean() > 0.1, name


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_changes_keep_shape_and_type_and_travel(name: str) -> None:
    change = pickle.loads(pickle.dumps(Change(name, 0.7)))
    found = changed(picture()[:, ::-1], (change, change))
    assert (found.shape, found.dtype) == ((S, S, 3), np.uint8)


def test_operations_are_drawn_evenly_at_one_strength_and_either_way() -> None:
    random = np.random.default_rng(1)
    drawn = [draw_changes(random, 2, 7) for _ in range(10_000)]
    every = [change for changes in drawn for change in changes]
    assert Counter(len(changes) for changes in drawn)[2] == pytest.approx(2500, abs=200)
    counts = Counter(change.name for change in every)
    assert counts.keys() == OPERATIONS.keys()
    assert all(count == pytest.approx(1000, abs=120) for count in counts.values())
    for name in OPERATIONS:
        shares = Counter(change.share for change in every if change.name == name)
        assert shares.keys() == ({0.7, -0.7} if name in _SIGNED else {0.7})
        assert name not in _SIGNED or shares[0.7] == pytest.approx(500, abs=90)


def test_crop_and_flip_stay_what_they_were_and_both_ways_of_resizing_are_changed_alike() -> None:
    plain = ImageTransform(S)
    transform = replace(plain, rand_augment=(2, 7))
    image = Image.fromarray(picture().repeat(3, 0).repeat(3, 1))
    seen = set()
    for seed in range(12):
        crop, before = transform.draw(image.size, seed), plain.draw(image.size, seed)
        assert replace(crop, changes=()) == before and crop == transform.draw(image.size, seed)
        seen.add(bool(crop.changes))
        turn = -1 if crop.mirror else 1
        fast, slow = resized_by_torch(image, crop.box, S, "bicubic"), transform.resized(image, crop.box)
        assert np.array_equal(TrainingPixels(transform)(image, seed), changed(fast[:, ::turn], crop.changes))
        expected = transform.normalised(changed(slow[:, ::turn], crop.changes))
        assert np.array_equal(transform.augment(image, seed), expected)
    assert seen == {True, False}
    assert np.array_equal(transform(image), plain(image)), "evaluation is not changed"
    assert transform.digest != plain.digest


def test_a_recipe_says_what_is_drawn() -> None:
    told = DataConfig(train="x", crop=(0.2, 0.9), flip=False, rand_augment=(2, 7))
    assert drawing(ImageTransform(S), told) == ImageTransform(S, crop_scale=(0.2, 0.9), flip=False, rand_augment=(2, 7))
    assert drawing(ImageTransform(S), DataConfig(train="x")) == ImageTransform(S)


def test_small_crops_of_large_jpegs_are_of_real_pixels() -> None:
    """Where a JPEG is decoded at a fraction, a crop of a fifth of it has no fewer pixels than the model takes."""
    sink = io.BytesIO()
    Image.fromarray(picture().repeat(16, 0).repeat(16, 1)).save(sink, "JPEG")  # 1024 x 1024
    for least in (0.5, 0.2, 0.08):
        transform = ImageTransform(S, crop_scale=(least, 1.0))
        side = decode_image(sink.getvalue(), at_least=transform.least_side).width
        assert side < 1024 and side * least**0.5 >= 2**0.5 * S
    assert ImageTransform(S).least_side == S


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"crop": (0.9, 0.2)}, "the smaller first"),
        ({"crop": (0.0, 1.0)}, "above 0"),
        ({"rand_augment": (2, 11)}, "less than or equal to 10"),
        ({"rand_augment": (0, 7)}, "greater than 0"),
        ({"flip": False, "augment": False}, "'flip' has no effect, for data.augment is false"),
        ({"crop": (0.2, 1.0), "placement": "cached", "cache": "c"}, "'crop' has no effect, for a cache holds"),
        ({"rand_augment": (2, 7), "placement": "cached", "cache": "c"}, "'rand_augment' has no effect"),
    ],
)
def test_what_could_not_be_drawn_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig(train="x", **wrong)
