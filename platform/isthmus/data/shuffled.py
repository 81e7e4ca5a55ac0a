"""The control of image-text training: every image keeps to the captions of another one.

A model that is trained so sees the same images, the same captions and as many pairs, and can learn nothing of what
belongs to what. What it reaches beyond chance on held-out pairs is a fault of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from isthmus.contracts import Sample
from isthmus.data.local import LocalRows
from isthmus.data.order import SampleOrder, mix
from isthmus.data.readers import RawSample
from isthmus.data.sets import Sets
from isthmus.errors import DataError

Captions = tuple[str, ...]
CaptionsOf = Callable[[np.ndarray], list[Captions | None]]
"""Row numbers -> the captions of each; None for a row that cannot be read."""

_PURPOSE = 0x5348  # sets this draw apart from those of the order and of augmentation


def partners(samples: int, seed: int) -> np.ndarray:
    """For each row the row whose captions it gets, int64: one cycle through all rows, so none keeps its own (from two
    rows on) and each caption is used once. Eight bytes for each sample of the set; a function of (samples, seed)."""
    cycle = np.random.default_rng(mix(seed, _PURPOSE)).permutation(samples)
    found = np.empty(samples, np.int64)
    found[cycle] = np.roll(cycle, -1)
    return found


def with_others_captions(
    source: Iterable[LocalRows], order: SampleOrder, rank: int, world: int, seed: int, captions_of: CaptionsOf
) -> Iterator[LocalRows]:
    """The same rows, each sample with the captions of its partner, in every epoch and on every rank the same one's.

    A partner that cannot be read is passed over for its own partner.

    Raises:
        DataError: there is only one sample.
    """
    if order.samples < 2:
        raise DataError("data.shuffled_pairs needs two samples or more.", "Name a larger set in data.train.")
    partner = partners(order.samples, seed)
    for local in source:
        numbers = order.local(local.step, rank, world)
        wanted = [place for place, row in enumerate(local.rows) if isinstance(row, Sample)]
        others = _readable(partner, numbers[wanted], captions_of)
        rows = list(local.rows)
        for place, captions in zip(wanted, others, strict=True):
            own = rows[place]
            assert isinstance(own, Sample)
            rows[place] = replace(own, captions=captions)
        yield replace(local, rows=tuple(rows))


def _readable(partner: np.ndarray, own: np.ndarray, captions_of: CaptionsOf) -> list[Captions]:
    asked = partner[own]
    found = captions_of(asked)
    while missing := [place for place, captions in enumerate(found) if not captions]:
        asked[missing] = partner[asked[missing]]
        if (asked == own).any():
            raise DataError("No other sample's captions can be read.", "Check the data with `isthmus data stats`.")
        for place, captions in zip(missing, captions_of(asked[missing]), strict=True):
            found[place] = captions
    return [captions for captions in found if captions]


def stored_captions(sets: Sets) -> CaptionsOf:
    """Reads captions where the samples are stored, with no more of the images than their first byte."""

    def captions_of(numbers: np.ndarray) -> list[Captions | None]:
        ascending, back = np.unique(numbers, return_inverse=True)
        read = [raw.captions if isinstance(raw, RawSample) else None for raw in sets.read(ascending, head=1)]
        return [read[place] for place in back.tolist()]

    return captions_of
