"""Train and held-out parts that share no caption and no image."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence

from isthmus.data.sources.text import comparable


def groups(captions: Mapping[str, Sequence[str]], images: Mapping[str, Hashable] | None = None) -> list[list[str]]:
    """Keys that must stay together: joined by ANY caption in common (once :func:`comparable`) or by the same image.

    Args:
        captions: key -> its captions.
        images: key -> what is equal for the same image.

    Returns:
        Groups of sorted keys, in the order of their first keys.
    """
    parent = {key: key for key in captions}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[Hashable, str] = {}
    for key in sorted(captions):
        marks: set[Hashable] = {("caption", comparable(text)) for text in captions[key]}
        if images is not None:
            marks.add(("image", images[key]))
        for mark in marks:
            one, other = root(first.setdefault(mark, key)), root(key)
            parent[max(one, other)] = min(one, other)
    found: dict[str, list[str]] = {}
    for key in sorted(captions):
        found.setdefault(root(key), []).append(key)
    return list(found.values())


def choose_heldout(groups: Sequence[Sequence[str]], count: int, seed: int) -> frozenset[str]:
    """Whole groups, in an order drawn from ``seed``, until ``count`` keys are chosen.

    At most a third of all keys is held out, and no group larger than a twentieth of ``count`` (one caption would then
    weigh too much in a score).
    """
    total = sum(len(group) for group in groups)
    count = min(count, total // 3)
    chosen: list[str] = []
    for group in sorted(groups, key=lambda group: rank(min(group), seed)):
        if len(group) <= max(1, count // 20) and len(chosen) + len(group) <= count:
            chosen += group
    return frozenset(chosen)


def rank(key: str, seed: int) -> bytes:
    """A place in a random order that depends on the key and the seed alone, not on what other keys there are."""
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
