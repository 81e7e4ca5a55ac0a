"""All drawn scenes of one kind of thing, as combinations of count, colour, shape and place: a test of composition.

Some combinations are held out. Every single value of an attribute is seen in training, and so is every pair of values;
what is new is only that they meet. So a model that has learnt the attributes and to bind them names a held-out scene,
and one that has learnt scenes by heart does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from isthmus.data.sources.scenes import COLOURS, PLACES, SHAPES, Scene

Attribute = Literal["count", "colour", "shape", "place"]
ATTRIBUTES: tuple[Attribute, ...] = ("count", "colour", "shape", "place")
COUNTS = ("one", "two", "three", "four")
QUESTIONS: dict[Attribute, str] = {
    "count": "how many are there",
    "colour": "what colour is it",
    "shape": "what shape is it",
    "place": "where is it",
}


@dataclass(frozen=True)
class Split:
    """Disjoint scenes."""

    train: tuple[Scene, ...]
    heldout: tuple[Scene, ...]


def every_scene() -> tuple[Scene, ...]:
    """All combinations, in a fixed order."""
    counts = range(1, len(COUNTS) + 1)
    return tuple(Scene(c, s, n, p) for n, c, s, p in product(counts, COLOURS, SHAPES, PLACES))


def split_scenes(share: float, seed: int) -> Split:
    """``share`` of all combinations held out, drawn by ``seed``; each pair of values stays in training.

    Raises:
        ValueError: so many are held out that a pair of values is never seen in training.
    """
    scenes = list(every_scene())
    random.Random(seed).shuffle(scenes)  # noqa: S311 - no secret
    cut = round(share * len(scenes))
    split = Split(tuple(scenes[cut:]), tuple(scenes[:cut]))
    unseen = _pairs(split.heldout) - _pairs(split.train)
    if unseen:
        raise ValueError(f"{len(unseen)} pairs of values are held out entirely, such as {sorted(unseen)[0]}")
    return split


def answers(scene: Scene) -> dict[Attribute, str]:
    """The one right answer to each of QUESTIONS."""
    return {"count": COUNTS[scene.count - 1], "colour": scene.colour, "shape": scene.shape, "place": scene.place}


def values(attribute: Attribute) -> tuple[str, ...]:
    """The closed set of answers to the attribute's question."""
    return {"count": COUNTS, "colour": tuple(COLOURS), "shape": SHAPES, "place": tuple(PLACES)}[attribute]


def neighbours(scene: Scene, generator: random.Random) -> dict[Attribute, Scene]:
    """For each attribute, a scene that differs from this one in it alone."""
    out: dict[Attribute, Scene] = {}
    for attribute in ATTRIBUTES:
        value = generator.choice([v for v in values(attribute) if v != answers(scene)[attribute]])
        changed = COUNTS.index(value) + 1 if attribute == "count" else value
        out[attribute] = replace(scene, **{attribute: changed})  # type: ignore[arg-type]
    return out


def fitting(caption: str, scenes: Sequence[Scene]) -> int:
    """How many of the scenes the caption describes: with more than one, no model can find the right one."""
    return sum(caption in scene.captions() for scene in scenes)


def retrieval_ceiling(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """The best recall at 1 of captions' own scenes that is to be expected: one of those that fit is guessed."""
    return sum(1 / fitting(caption, scenes) for caption in captions) / len(captions)


def _pairs(scenes: Sequence[Scene]) -> set[tuple[str, str]]:
    found = set()
    for scene in scenes:
        own = [f"{attribute}={value}" for attribute, value in answers(scene).items()]
        found |= {(a, b) for a in own for b in own if a < b}
    return found
