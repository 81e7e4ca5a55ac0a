"""One or several indexed data sets as one list of rows: those of the first, then those of the second, and so on.

Sample ids are unique within a data set only: two sets whose shards have the same names have the same ids. Where samples
of several sets meet, ids are therefore made distinct by the digest of each set; feature caches and manifests keep the
sets' own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from isthmus import storage
from isthmus.contracts import Sample
from isthmus.data.manifest import Manifest
from isthmus.data.readers import Failure, RawSample, read_rows

Named = tuple[tuple[str, str], ...]
"""(URL, digest of the manifest) of each data set."""


@dataclass(frozen=True)
class Sets:
    """The manifests of a run, at least one. Their rows are counted through."""

    manifests: tuple[Manifest, ...]

    @property
    def several(self) -> bool:
        """Whether samples of different sets meet."""
        return len(self.manifests) > 1

    @property
    def named(self) -> Named:
        """What another process needs to open the same sets."""
        return tuple((manifest.root, manifest.digest) for manifest in self.manifests)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(manifest) for manifest in self.manifests)])

    @functools.cached_property
    def _salts(self) -> tuple[int, ...]:
        """What is mixed into each set's ids: 63 bits of its digest, and nothing where the set is alone."""
        return tuple(int(m.digest[:16], 16) >> 1 if self.several else 0 for m in self.manifests)

    def set_of(self, row: int) -> int:
        """Number of the set that ``row`` is of."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def place(self, row: int) -> tuple[Manifest, int]:
        """The manifest of ``row``, and its number there."""
        number = self.set_of(row)
        return self.manifests[number], row - int(self._starts[number])

    def unique_id(self, row: int, own: int) -> int:
        """``own``, the id that its set gives to the sample of ``row``, made distinct from other sets' ids.

        Exclusive or with a constant of each set: reversible, and never negative where ``own`` is not.
        """
        return own ^ self._salts[self.set_of(row)]

    def by_set(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number of a set, which of ``rows`` are its own, their numbers there). Padding is no set's."""
        for number, (start, stop) in enumerate(pairwise(self._starts.tolist())):
            here = (rows >= start) & (rows < stop)
            if here.any():
                yield number, here, rows[here] - start

    def image_bytes(self, rows: np.ndarray, *, sounds: bool = False) -> np.ndarray:
        """Size of each encoded image (and its sound file), int64 in the shape of ``rows``; 0 for padding."""
        sizes = np.zeros(rows.shape, np.int64)
        for number, here, own in self.by_set(rows):
            sizes[here] = self.manifests[number].image_bytes_of(own)
            if sounds:
                sizes[here] += self.manifests[number].sound_bytes_of(own)
        return sizes

    def image_ids(self, rows: np.ndarray) -> np.ndarray:
        """Id of each sample's image, int64 in the shape of ``rows``, distinct between sets; -1 for padding."""
        ids = np.full(rows.shape, -1, np.int64)
        for number, here, own in self.by_set(rows):
            ids[here] = self.manifests[number].image_ids_of(own) ^ self._salts[number]
        return ids

    def read(self, rows: np.ndarray, head: int | None = None, *, sounds: bool = False) -> Iterator[RawSample | Failure]:
        """The stored samples of ``rows``, which ascend; no padding among them. As :func:`read_rows` for one set."""
        for number, _, own in self.by_set(rows):
            yield from read_rows(self.manifests[number], own, head, sounds=sounds)

    def as_met(
        self, rows: Sequence[Sample | Failure | None], numbers: np.ndarray, visits: np.ndarray, *, images: bool
    ) -> tuple[Sample | Failure | None, ...]:
        """``rows`` of row numbers ``numbers`` as samples of several sets meet in a batch.

        Ids are distinct, each sample knows how often it was visited, and each failure the whole URL of its shard.

        Args:
            images: also name the samples' images.
        """
        image_ids = self.image_ids(numbers).tolist() if images else [None] * len(rows)
        found = zip(rows, numbers.tolist(), visits.tolist(), image_ids, strict=True)
        return tuple(self._met(row, *facts) if row else None for row, *facts in found)

    def _met(self, row: Sample | Failure, number: int, visit: int, image_id: int | None) -> Sample | Failure:
        if isinstance(row, Failure):
            manifest, _ = self.place(number)
            return replace(row, shard=storage.join(manifest.root, row.shard)) if self.several else row
        if self.several:
            return replace(row, id=self.unique_id(number, row.id), image_id=image_id, visit=visit)
        return replace(row, image_id=image_id)
