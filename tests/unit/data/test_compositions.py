"""Combinations of attributes: disjoint splits, questions with one answer, changes of one attribute, ceilings."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from isthmus.data.sources.compositions import (
    ATTRIBUTES,
    COUNTS,
    QUESTIONS,
    answers,
    every_scene,
    fitting,
    neighbours,
    retrieval_ceiling,
    split_scenes,
    values,
)
from isthmus.data.sources.scenes import COLOURS, PLACES, Scene, render


def test_held_out_combinations_are_new_and_all_their_pairs_are_known() -> None:
    split = split_scenes(0.2, seed=0)
    assert (
        len(split.train) + len(split.heldout) == len(set(split.train) | set(split.heldout)) == len(every_scene()) == 960
    )
    assert len(split.heldout) == 192 and split_scenes(0.2, 0) == split != split_scenes(0.2, 1)
    for first in ATTRIBUTES:
        for second in ATTRIBUTES:
            seen = {(answers(s)[first], answers(s)[second]) for s in split.train}
            assert seen >= {(answers(s)[first], answers(s)[second]) for s in split.heldout}
    with pytest.raises(ValueError, match="held out entirely"):
        split_scenes(0.97, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_captions_and_answers_say_what_is_drawn(seed: int) -> None:
    """Read back from the pixels: the colour, the half of the picture, and the number of separate things."""
    generator = random.Random(seed)
    for scene in generator.sample(every_scene(), 12):
        pixels = np.asarray(Image.open(io.BytesIO(render(scene, seed))).convert("RGB")).astype(int)
        ours = np.abs(pixels - np.array(COLOURS[scene.colour])).sum(2) < 30
        assert ours.sum() > 60
        row, column = (axis.mean() / 128 for axis in ours.nonzero())
        x, y = PLACES[scene.place]
        assert abs(column - x) < 0.12 and abs(row - y) < 0.12
        facts = answers(scene)
        assert set(facts) == set(QUESTIONS) and all(facts[a] in values(a) for a in ATTRIBUTES)
        for caption in scene.captions():
            assert scene.colour in caption and scene.shape in caption and scene.place in caption
            words = caption.split()
            assert (facts["count"] in words) if scene.count > 1 else ("a" in words or "an" in words)
        if scene.shape not in ("ring", "cross", "star"):
            assert pieces(ours) == scene.count == COUNTS.index(facts["count"]) + 1


def pieces(mask: np.ndarray) -> int:
    """Connected parts, by flooding."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            r, c = edge.pop()
            near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & left
            left -= near
            edge += near
    return count


def test_neighbours_differ_in_one_attribute() -> None:
    generator = random.Random(0)
    for scene in generator.sample(every_scene(), 30):
        for attribute, other in neighbours(scene, generator).items():
            changed = [a for a in ATTRIBUTES if answers(scene)[a] != answers(other)[a]]
            assert changed == [attribute]
            assert not set(scene.captions()) & set(other.captions())


def test_the_ceiling_counts_scenes_that_one_caption_fits() -> None:
    red, blue = Scene("red", "star", 2, "in the middle"), Scene("blue", "star", 2, "in the middle")
    caption = red.captions()[0]
    assert fitting(caption, [red, blue]) == 1 and fitting(caption, [red, blue, red]) == 2
    assert retrieval_ceiling([caption, blue.captions()[1], caption], [red, blue, red]) == pytest.approx(2 / 3)
