"""One or several indexed data sets as one list of rows: those of the first, then those of the second, and so on.

Sample ids are unique within a data set only: two sets whose shards have the same names have the same ids. Where samples
of several sets meet, ids are therefore made distinct by the digest of each set; feature caches and manifests keep the
sets' own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

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
        """``own``, an id that its set gives to the sample or the image of ``row``, made distinct from other sets' ids.

        Exclusive or with a constant of each set: reversible, and never negative where ``own`` is not.
        """
        return own ^ self._salts[self.set_of(row)]

    def image_bytes(self, rows: np.ndarray) -> np.ndarray:
        """Size of each encoded image, int64 in the shape of ``rows``; 0 for padding."""
        sizes = np.zeros(rows.shape, np.int64)
        for manifest, start, stop in zip(self.manifests, self._starts, self._starts[1:], strict=False):
            here = (rows >= start) & (rows < stop)
            sizes[here] = manifest.image_bytes[rows[here] - start]
        return sizes

    def read(self, rows: np.ndarray) -> Iterator[RawSample | Failure]:
        """The stored samples of ``rows``, which ascend; no padding among them. As :func:`read_rows` for one set."""
        cuts = np.searchsorted(rows, self._starts)
        parts = zip(self.manifests, self._starts, cuts, cuts[1:], strict=False)
        return chain.from_iterable(read_rows(manifest, rows[a:b] - start) for manifest, start, a, b in parts if b > a)

    def as_met(
        self, rows: Sequence[Sample | Failure | None], numbers: np.ndarray, visits: np.ndarray, *, images: bool
    ) -> tuple[Sample | Failure | None, ...]:
        """``rows`` of row numbers ``numbers`` as samples of several sets meet in a batch.

        Ids are distinct, each sample knows how often it was visited, and each failure the whole URL of its shard.

        Args:
            images: also name the samples' images.
        """
        return tuple(
            row if row is None else self._met(row, int(number), int(visit), images)
            for row, number, visit in zip(rows, numbers, visits, strict=True)
        )

    def _met(self, row: Sample | Failure, number: int, visit: int, images: bool) -> Sample | Failure:
        manifest, own = self.place(number)
        if isinstance(row, Failure):
            return replace(row, shard=storage.join(manifest.root, row.shard)) if self.several else row
        if images:
            row = replace(row, image_id=self.unique_id(number, int(manifest.image_ids[own])))
        if self.several:
            row = replace(row, id=self.unique_id(number, row.id), visit=visit)
        return row
