"""Data sets as their authors publish them: COCO, Karpathy, VQAv2 and Flickr30k files, folders of classes.

Every reader gives a :class:`Layout`: the images in the order of the file, each with what is said of it. Ids that are
missing, doubled or do not fit together are refused by file and id; a file name that leaves its folder is refused too.
Whether an image file is there shows when it is read.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.config import LayoutConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts.checks import Sources, as_negatives
from isthmus.evaluation.layouts.coco import coco, karpathy
from isthmus.evaluation.layouts.flickr30k import flickr30k
from isthmus.evaluation.layouts.folders import classes
from isthmus.evaluation.layouts.types import Extras, Item, Layout, Question, Read
from isthmus.evaluation.layouts.vqav2 import vqav2

__all__ = ["Extras", "Item", "Layout", "Question", "as_negatives", "read_layout"]


_READERS: dict[str, Callable[[LayoutConfig, Sources], Read]] = {
    "coco": coco,
    "karpathy": karpathy,
    "vqav2": vqav2,
    "flickr30k": flickr30k,
    "classes": classes,
}


def read_layout(config: LayoutConfig) -> Layout:
    """The data set that ``config`` names.

    Raises:
        DataError: a file that is not of its layout, ids missing or doubled, a file name that leaves the folder.
        StorageError: a file that cannot be read.
    """
    sources = Sources()
    split, items, names, training = _READERS[config.kind](config, sources)
    if not items:
        raise DataError(f"{config.annotations or config.images} names no image.", "Is it the right file and split?")
    for item in items:
        sources.add(item.file.encode())
    return Layout(config.images, split, sources.digest, tuple(items), tuple(names), tuple(training))
