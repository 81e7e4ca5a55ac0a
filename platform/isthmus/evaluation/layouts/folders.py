"""Folders of images, each the name of a class."""

from __future__ import annotations

from isthmus import storage
from isthmus.config import LayoutConfig
from isthmus.data.names import parse_table
from isthmus.errors import DataError
from isthmus.evaluation.layouts.checks import Sources, below_folder, no_doubles, stem
from isthmus.evaluation.layouts.types import Extras, Item, Read

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_SUFFIXES = _SUFFIXES + tuple(suffix.upper() for suffix in _SUFFIXES)


def classes(config: LayoutConfig, sources: Sources) -> Read:
    """A folder a class, named by the folder or by ``class_names``."""
    root = config.images.rstrip("/")
    files = sorted(url[len(root) + 1 :] for url, _ in storage.list_files(root, IMAGE_SUFFIXES))
    outside = [file for file in files if "/" not in file]
    if outside:
        raise DataError(
            f"{len(outside)} images of {root} lie in no class folder (first {outside[0]}).",
            "Put every image into the folder of its class.",
        )
    given = parse_table(sources.text(config.class_names), config.class_names) if config.class_names else {}
    folders = sorted({file.partition("/")[0] for file in files})
    if given and (unnamed := sorted(set(folders) - set(given))):
        raise DataError(f"{config.class_names} has no name for the folder '{unnamed[0]}'.", "Name every class.")
    names = {folder: given.get(folder, folder.replace("_", " ")).strip() for folder in folders}
    no_doubles(config.class_names or root, "class name", list(names.values()))
    items = [
        Item(row, below_folder(file, root), (), Extras(label=names[file.partition("/")[0]]))
        for row, file in enumerate(files)
    ]
    return config.split or stem(root), items, sorted(names.values()), ()
