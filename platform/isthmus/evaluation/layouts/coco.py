"""COCO's caption file and Karpathy's split of it."""

from __future__ import annotations

from isthmus.config import LayoutConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts.checks import (
    FETCH_AGAIN,
    Sources,
    below_folder,
    by_id,
    captioned,
    entries_of,
    negatives_of,
    no_doubles,
    required,
    stem,
)
from isthmus.evaluation.layouts.types import Item, Read


def coco(config: LayoutConfig, sources: Sources) -> Read:
    """COCO: ``images`` and ``annotations``, a caption an annotation."""
    url = config.annotations or ""
    table = sources.table(url)
    images = by_id(url, "images", entries_of(table, "images", url), "id")
    captions: dict[int, list[str]] = {number: [] for number in images}
    for number, entry in by_id(url, "annotations", entries_of(table, "annotations", url), "id").items():
        image = required(entry, "image_id", int, f"{url}: annotation {number}")
        if image not in captions:
            raise DataError(
                f"{url}: annotation {number} is of image {image}, which is not among the images.", FETCH_AGAIN
            )
        captions[image].append(required(entry, "caption", str, f"{url}: annotation {number}"))
    items = []
    for number, entry in images.items():
        file = below_folder(required(entry, "file_name", str, f"{url}: image {number}"), url)
        items.append(Item(number, file, captioned(url, number, captions[number]), negatives_of(entry, url, number)))
    return config.split or stem(url), items, (), ()


def karpathy(config: LayoutConfig, sources: Sources) -> Read:
    """Karpathy: an image an entry, with its split and sentences. ``split`` may name several, joined by '+'."""
    url = config.annotations or ""
    wanted = set((config.split or "").split("+"))
    entries = entries_of(sources.table(url), "images", url)
    images = by_id(url, "images", entries, "imgid")
    there = {required(entry, "split", str, f"{url}: image {number}") for number, entry in images.items()}
    if wanted - there:
        raise DataError(
            f"{url} has no split '{', '.join(sorted(wanted - there))}'.", f"It has: {', '.join(sorted(there))}."
        )
    items, sentences = [], set[int]()
    for number, entry in images.items():
        where = f"{url}: image {number}"
        texts = []
        for sentence in entries_of(entry, "sentences", where):
            known = required(sentence, "sentid", int, where)
            if known in sentences:
                raise DataError(f"{url} holds the sentence {known} more than once.", FETCH_AGAIN)
            sentences.add(known)
            if sentence.get("imgid", number) != number:
                raise DataError(f"{where} holds the sentence {known} of image {sentence['imgid']}.", FETCH_AGAIN)
            texts.append(required(sentence, "raw", str, where))
        if entry["split"] in wanted:
            folder = str(entry.get("filepath") or "")
            name = required(entry, "filename", str, where)
            file = below_folder(f"{folder}/{name}" if folder else name, url)
            known = int(entry.get("cocoid", number))
            items.append(Item(known, file, captioned(url, number, texts), negatives_of(entry, url, number)))
    no_doubles(url, "cocoid", [item.id for item in items])
    return config.split or "", items, (), ()
