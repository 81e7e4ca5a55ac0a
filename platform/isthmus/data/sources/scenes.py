"""Drawn scenes of coloured shapes: what stands in where no real set can be fetched, and a test of composition.

A scene is a count, a colour, a shape and a place, or two single shapes in a relation. Each caption names the whole
scene, so a model has to bind colour to shape and place to tell scenes apart.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageDraw

from isthmus.data.shardwriter import Pair

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 90, 214),
    "yellow": (244, 208, 63),
    "purple": (125, 60, 152),
    "orange": (230, 126, 34),
    "black": (30, 30, 30),
    "pink": (240, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = {
    "at the top left": (0.28, 0.28),
    "at the top right": (0.72, 0.28),
    "at the bottom left": (0.28, 0.72),
    "at the bottom right": (0.72, 0.72),
    "in the middle": (0.5, 0.5),
}
RELATIONS = {
    "left of": ((0.28, 0.5), (0.72, 0.5)),
    "right of": ((0.72, 0.5), (0.28, 0.5)),
    "above": ((0.5, 0.28), (0.5, 0.72)),
    "below": ((0.5, 0.72), (0.5, 0.28)),
}
_MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_SIDE = 128


@dataclass(frozen=True)
class Scene:
    """What is to be seen: ``count`` shapes at a place, or one shape in a relation to another."""

    colour: str
    shape: str
    count: int = 1
    place: str = ""
    relation: str = ""
    other_colour: str = ""
    other_shape: str = ""

    def captions(self) -> tuple[str, ...]:
        """Five sentences, each of which says all of it."""
        if self.relation:
            one, other = f"{self.colour} {self.shape}", f"{self.other_colour} {self.other_shape}"
            return (
                f"{_a(one)} {self.relation} {_a(other)}",
                f"there is {_a(one)} {self.relation} {_a(other)}",
                f"a drawing of {_a(one)} {self.relation} {_a(other)}",
                f"{_a(other)} {_MIRRORED[self.relation]} {_a(one)}",
                f"the picture shows {_a(one)} {self.relation} {_a(other)}",
            )
        things = _things(self.count, self.colour, self.shape)
        verb = "is" if self.count == 1 else "are"
        return (
            f"{things} {self.place}",
            f"there {verb} {things} {self.place}",
            f"a drawing of {things} {self.place}",
            f"{self.place} {verb} {things}",
            f"the picture shows {things} {self.place}",
        )

    def key(self) -> str:
        """Names the scene, not the drawing."""
        words = [
            self.colour,
            self.shape,
            str(self.count),
            self.place,
            self.relation,
            self.other_colour,
            self.other_shape,
        ]
        return "-".join("-".join(words).replace(" ", "-").strip("-").split("--"))


def render(scene: Scene, seed: int) -> bytes:
    """A 128 x 128 PNG; size, exact place and background vary with ``seed`` and change nothing the captions say."""
    draw_from = random.Random(seed)  # noqa: S311 - pictures, not secrets
    background = tuple(draw_from.randint(232, 255) for _ in range(3))
    image = Image.new("RGB", (_SIDE * 2, _SIDE * 2), background)
    pen = ImageDraw.Draw(image)
    for colour, shape, x, y, radius in _layout(scene, draw_from):
        _draw(pen, shape, COLOURS[colour], x * _SIDE * 2, y * _SIDE * 2, radius * _SIDE * 2, background)
    buffer = io.BytesIO()
    image.resize((_SIDE, _SIDE), Image.Resampling.BOX).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def draw_scene(generator: random.Random) -> Scene:
    """Half of them counts and places, half relations of two different things."""
    colour, shape = generator.choice(list(COLOURS)), generator.choice(SHAPES)
    if generator.random() < 0.5:
        return Scene(colour, shape, generator.randint(1, 4), generator.choice(list(PLACES)))
    others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) != (colour, shape)]
    other_colour, other_shape = generator.choice(others)
    return Scene(colour, shape, 1, "", generator.choice(list(RELATIONS)), other_colour, other_shape)


def scenes(count: int, seed: int) -> Iterator[Pair]:
    """``count`` drawn scenes, the same for the same seed."""
    generator = random.Random(seed)  # noqa: S311
    for number in range(count):
        scene = draw_scene(generator)
        image = render(scene, generator.getrandbits(48))
        meta = {"source": "scenes", "scene": scene.key()}
        yield Pair(f"scenes-{number:06d}", image, "png", scene.captions(), meta)


def _layout(scene: Scene, generator: random.Random) -> Iterator[tuple[str, str, float, float, float]]:
    def near(value: float) -> float:
        return value + generator.uniform(-0.04, 0.04)

    if scene.relation:
        (x, y), (other_x, other_y) = RELATIONS[scene.relation]
        yield scene.colour, scene.shape, near(x), near(y), generator.uniform(0.11, 0.17)
        yield scene.other_colour, scene.other_shape, near(other_x), near(other_y), generator.uniform(0.11, 0.17)
        return
    x, y = PLACES[scene.place]
    offsets: dict[int, list[tuple[float, float]]] = {
        1: [(0, 0)],
        2: [(-1, 0), (1, 0)],
        3: [(-1, 0.8), (1, 0.8), (0, -0.8)],
    }
    spots = offsets.get(scene.count, [(-1, -1), (1, -1), (-1, 1), (1, 1)])
    radius = generator.uniform(0.12, 0.18) if scene.count == 1 else generator.uniform(0.07, 0.09)
    x, y = near(x), near(y)
    for step_x, step_y in spots:
        yield scene.colour, scene.shape, x + step_x * 0.1, y + step_y * 0.1, radius


def _draw(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    x: float,
    y: float,
    r: float,
    back: tuple[int, ...],
) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle((x - r * 0.88, y - r * 0.88, x + r * 0.88, y + r * 0.88), fill=colour)
    elif shape == "triangle":
        pen.regular_polygon((x, y, r * 1.1), 3, fill=colour)
    elif shape == "star":
        pen.polygon(_star(x, y, r * 1.1), fill=colour)
    elif shape == "cross":
        pen.rectangle((x - r, y - r * 0.3, x + r, y + r * 0.3), fill=colour)
        pen.rectangle((x - r * 0.3, y - r, x + r * 0.3, y + r), fill=colour)
    else:
        pen.ellipse(box, fill=colour)
        pen.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=back)


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    points = ((r if i % 2 == 0 else r * 0.42, pi * (i / 5 - 0.5)) for i in range(10))
    return [(x + length * cos(angle), y + length * sin(angle)) for length, angle in points]


def _a(thing: str) -> str:
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def _things(count: int, colour: str, shape: str) -> str:
    if count == 1:
        return _a(f"{colour} {shape}")
    return f"{_NUMBERS[count]} {colour} {shape}{'es' if shape == 'cross' else 's'}"
