"""What a published data set holds once it is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from isthmus.contracts import Question


@dataclass(frozen=True)
class Extras:
    """What is said of an image beside its captions.

    Attributes:
        label: its class, "" where it has none.
        negatives: captions that are wrong for it.
    """

    questions: tuple[Question, ...] = ()
    label: str = ""
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """An image: id, file name below the images' folder, captions and the rest."""

    id: int
    file: str
    captions: tuple[str, ...] = ()
    extras: Extras = Extras()


@dataclass(frozen=True)
class Layout:
    """A data set that was read.

    Attributes:
        root: of the image files.
        split: as the recipe calls it, or as the file does.
        digest: sha256 over the annotation files and the images' names; the images' bytes are not in it.
        items: in the order of the file.
        classes: every class, sorted, for classification.
        training: (question kind, answers) of the training questions, for VQA's prior.
    """

    root: str
    split: str
    digest: str
    items: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    training: tuple[Question, ...] = field(default=(), repr=False)


Read = tuple[str, list[Item], Iterable[str], Iterable[Question]]
"""What a reader gives: split, items, classes, the training questions."""
