"""What a fetch did, as it is told to the user and kept beside the data in ``fetch.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SourceReport:
    """One source's part.

    Attributes:
        train, heldout: images in each split.
        captions: captions in both.
        dropped: images left out, by reason.
        near_duplicate_share: share of its held-out images that have a near-double among all training images.
    """

    train: int
    heldout: int
    captions: int
    dropped: Mapping[str, int]
    near_duplicate_share: float


@dataclass(frozen=True)
class FetchReport:
    """What was written where.

    Attributes:
        name: what was asked for.
        out: folder or URL; the splits are its folders ``train`` and ``heldout``.
        synthetic: True for drawn scenes, False for a real set.
        train, heldout: images in each split.
        sources: by source name.
        near_duplicate_share: as in :class:`SourceReport`, over all held-out images.
        shared_captions: captions that are in both splits; 0 by construction, counted all the same.
        bytes: of all shards.
        shards: number of shards.
        images: how many images are the package's own bytes (``kept``) and how many were scaled down (``resized``) to
            ``max_side``.
        licences: by source name.
        seconds: it took.
        reused: nothing was done because the same request had been fulfilled before.
    """

    name: str
    out: str
    synthetic: bool
    train: int
    heldout: int
    sources: Mapping[str, SourceReport]
    near_duplicate_share: float
    shared_captions: int
    bytes: int
    shards: int
    images: Mapping[str, int]
    licences: Mapping[str, str]
    seconds: float
    reused: bool = field(default=False, compare=False)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> FetchReport:
        """From ``fetch.json``'s ``report``, marked as reused."""
        sources = {name: SourceReport(**part) for name, part in record["sources"].items()}
        return cls(**{**record, "sources": sources, "reused": True})
