"""Captions: what is cleaned, what counts as English, what counts as the same; groups, looks, scenes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from isthmus.data.sources import clipart, images, scenes, split
from isthmus.data.sources.clipart import Metadata
from isthmus.data.sources.text import English, comparable, distinct, first_sentence, lower_opener, tidy

WORD_LIST = """a an and apple arrow Australia big bird black blue boat Brazil cat duck flag frog green in of pie pumpkin
    stop sign states symphony the tree united white with wolf yellow map play card litter disposal orchestra music"""
ENGLISH = English.of(WORD_LIST.split())


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("tennis_racket  ", "tennis racket"),
        ("A frog.", "A frog"),
        ("Fish &amp;amp; chips", "Fish & chips"),
        ("“Kennedy Half Dollar.”", "Kennedy Half Dollar"),
        ("called a “Half Dollar.”", "called a Half Dollar"),
        ('an odd " quote', "an odd quote"),
        ("Saturn—the ringed planet", "Saturn, the ringed planet"),
        ("1 euro (1 €).", "1 euro (1 €)"),
        ("ｆｕｌｌ ﬁsh", "full fish"),
        ("apple.svg by x@y.org", "apple by"),
        ("<b>apple</b> www.example.org", "apple"),
        ("a tab\tand\nline", "a tab and line"),
        ("the letter L", "the letter L"),
        ("123", None),
        ("M", None),
        (" - ", None),
    ],
)
def test_tidy(raw: str, clean: str | None) -> None:
    assert tidy(raw) == clean


@given(st.text(max_size=60))
def test_tidy_never_leaves_what_a_caption_file_cannot_hold(text: str) -> None:
    cleaned = tidy(text)
    if cleaned is not None:
        assert cleaned == cleaned.strip() and len(cleaned.splitlines()) == 1 and "  " not in cleaned
        assert "_" not in cleaned and any(c.isalpha() for c in cleaned)


def test_sentences_and_openers() -> None:
    assert first_sentence("A bin. Keep out!") == "A bin."
    assert first_sentence("A US 10 cent piece ($.10) called a dime.") == "A US 10 cent piece ($.10) called a dime."
    assert lower_opener("A frog") == "a frog" and lower_opener("Santa Claus") == "Santa Claus"


@pytest.mark.parametrize(
    ("one", "other"),
    [("A Frog!", "frog"), ("flag: Brazil", "Flag  Brazil."), ("café_au-lait", "Cafe au lait"), ("Don't", "dont")],
)
def test_comparable_joins(one: str, other: str) -> None:
    assert comparable(one) == comparable(other)


def test_comparable_keeps_apart_what_differs() -> None:
    assert len({comparable(c) for c in ("letter A", "letter B", "the", "frog 1", "frog 2", "two frogs")}) == 6
    assert distinct(["A frog", None, "frog!", "", "a toad"]) == ("A frog", "a toad")


def test_english_knows_and_cases() -> None:
    assert ENGLISH.share("Pumpkin Pie") == 1.0 and ENGLISH.share("Lumaca blue") == 0.5 and ENGLISH.share("123") == 0.0
    assert ENGLISH.cased("Pumpkin Pie USB") == "pumpkin pie USB"
    assert ENGLISH.cased("brazil Map") == "Brazil map"


CASES = [
    ("food/pie", Metadata("Pumpkin_Pie", "", ("hash", "apple")), False, ("pumpkin pie", "pumpkin pie, apple")),
    ("a/duck", Metadata("Duck (Yellow)", "", ()), False, ("yellow duck",)),
    ("a/cat", Metadata("Cat (B and W)", "", ()), False, ("cat in black and white",)),
    ("a/sign", Metadata("StopSign", "", ()), False, ("stop sign",)),
    ("a/tree", Metadata("tree12", "", ()), False, ("tree",)),
    ("a/boat", Metadata("Boat", "a big boat", ()), False, ("boat", "a big boat")),
    ("a/boat", Metadata("Boat", "HASH(0x89b1318)", ("0x12",)), False, ("boat",)),
    (
        "a/flags/b",
        Metadata("Clipart by A B - United States - Brazil", "", ()),
        False,
        ("flag of Brazil, United States",),
    ),
    ("x/cards/simple/simple_h_k", Metadata("card", "", ()), True, ("king of hearts playing card",)),
    ("s/aiga_litter_disposal_", Metadata("AIGA_Symbol_Signs", "", ()), True, ("litter disposal",)),
    ("m/orch", Metadata("Symphony xylo", "", ("xylo", "music")), False, ("symphony xylo", "symphony xylo, music")),
    ("computer/icons/stop", Metadata("Some theme", "", ()), True, "icon theme or geometric series"),
    ("a/lumaca", Metadata("Lumaca turbo", "", ()), False, "not English"),
    ("a/rosa", Metadata("Various Cliparts", "", ()), True, "not English"),
    ("a/none", Metadata("", "", ()), False, "no title"),
]


@pytest.mark.parametrize(("name", "metadata", "collection", "wanted"), CASES)
def test_clipart_captions(name: str, metadata: Metadata, collection: bool, wanted: tuple[str, ...] | str) -> None:
    assert clipart.caption(name, metadata, ENGLISH, collection) == wanted


def test_collection_titles_are_told_from_repeated_ones() -> None:
    described = {f"a/thing{i}": Metadata("Some Theme", "", ()) for i in range(6)}
    described |= {f"b/duck_{i}": Metadata("Duck", "", ()) for i in range(6)}
    described |= {f"c/card{i}": Metadata("card", "", ()) for i in range(20)}
    described |= {f"d/{i}": Metadata("Clipart by A B - antenna", "", ()) for i in range(2)}
    described |= {"e/one": Metadata("Clipart by A B - boat", "", ())}
    assert clipart.collection_titles(described) == {"Some Theme", "card", "Clipart by A B - antenna"}


def test_svg_metadata_ignores_other_titles_and_broken_markup() -> None:
    text = "<svg><g><cc:Work><dc:title>A &amp; B</dc:title><dc:creator><dc:title>Me</dc:title></dc:creator></cc:Work>"
    assert clipart.parse(text) == Metadata("A & B", "", ())
    assert clipart.parse("<svg/>") == Metadata("", "", ())


def test_groups_join_by_any_caption_and_by_image() -> None:
    said = {"a": ["x", "y"], "b": ["Y!"], "c": ["z"], "d": ["the Z", "w"], "e": ["v"], "f": ["u"]}
    joined = split.groups(said, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 5})
    assert joined == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert split.groups({"a": ["1 x"], "b": ["x y"], "c": ["y z", "x y", "1 x"]}) == [["a", "b", "c"]]


def test_heldout_takes_whole_groups_of_bearable_size() -> None:
    parts = [[f"g{i}", f"h{i}"] for i in range(100)] + [[f"big{i}" for i in range(60)]]
    chosen = split.choose_heldout(parts, 40, seed=1)
    assert len(chosen) == 40 and not any(key.startswith("big") for key in chosen)
    assert all((f"g{i}" in chosen) == (f"h{i}" in chosen) for i in range(100))
    assert chosen == split.choose_heldout(parts[::-1], 40, seed=1) != split.choose_heldout(parts, 40, seed=2)
    assert len(split.choose_heldout([[str(i)] for i in range(30)], 600, seed=0)) == 10


def drawing(side: int = 96, shift: int = 0, colour: str = "red") -> Image.Image:
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    pen = ImageDraw.Draw(image)
    pen.ellipse((side // 6 + shift, side // 5, side // 2 + shift, side * 3 // 4), fill=colour)
    pen.rectangle((side // 2, side // 8, side * 7 // 8, side // 3), fill="navy")
    return image


def test_looks_survive_scaling_and_tell_pictures_apart() -> None:
    one = images.look(images.on_white(drawing()))
    scaled = images.look(images.on_white(drawing(side=288).convert("P")))
    assert images.near_duplicates([scaled], [one]).tolist() == [True]
    others = [drawing(colour="lime"), drawing().rotate(90), drawing(shift=30)]
    assert (
        images.near_duplicates([images.look(images.on_white(other)) for other in others], [one]).tolist() == [False] * 3
    )
    assert images.near_duplicates([], [one]).tolist() == [] and images.near_duplicates([one], []).tolist() == [False]


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert np.asarray(images.on_white(image)).min() == 255
    assert np.asarray(images.on_white(Image.new("LA", (8, 8), (0, 0)))).min() == 255


def test_scene_captions_say_everything_and_mirror_one_another() -> None:
    generator = random.Random(0)
    by_captions: dict[tuple[str, ...], str] = {}
    for _ in range(400):
        scene = scenes.draw_scene(generator)
        said = scene.captions()
        assert len(set(said)) == 5 and all(scene.colour in c and scene.shape in c for c in said)
        assert by_captions.setdefault(said, scene.key()) == scene.key()
    one = scenes.Scene("red", "circle", 1, "", "left of", "blue", "star")
    other = scenes.Scene("blue", "star", 1, "", "right of", "red", "circle")
    assert set(one.captions()) & set(other.captions()) == {
        "a red circle left of a blue star",
        "a blue star right of a red circle",
    }
    assert scenes.Scene("orange", "cross", 2, "in the middle").captions()[0] == "two orange crosses in the middle"


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_scene_shows_its_colour_at_its_place(shape: str) -> None:
    import io

    image = Image.open(io.BytesIO(scenes.render(scenes.Scene("red", shape, 1, "at the top left"), seed=5)))
    pixels = np.asarray(image.convert("RGB")).astype(int)
    red_HW = (pixels[..., 0] > 150) & (pixels[..., 1] < 100)
    rows, columns = np.nonzero(red_HW)
    assert red_HW.sum() > 100 and rows.mean() < 64 and columns.mean() < 64
