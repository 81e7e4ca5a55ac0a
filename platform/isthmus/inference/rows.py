"""Manifest rows, ids and shards of a bulk job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from isthmus.data.manifest import Manifest
from isthmus.data.readers import Failure, failure_of
from isthmus.errors import DataError
from isthmus.inference.commits import Quarantined


class Rows:
    """Looks up what a manifest says of a row.

    Args:
        manifest: of the data set.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def ids(self, rows: Sequence[int]) -> list[int]:
        """int64 ids of the rows."""
        return self._manifest.ids_of(rows).tolist()

    def shards(self, ids: Sequence[int], rows: Sequence[int]) -> list[str]:
        """Shard names of ``ids``, all of which are among ``rows``."""
        where = dict(zip(self.ids(rows), rows, strict=True))
        return [self.shard(where[i]) for i in ids]

    def shard(self, row: int) -> str:
        """Name of the shard that holds a row."""
        return self._manifest.shard_of(row).name

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up without having been read."""
        return from_failure(failure_of(self._manifest, row, reason))

    def complete(self, rows: Sequence[int], done: Sequence[int], aside: Sequence[Quarantined]) -> None:
        """Refuses a reader's answer in which an image is missing or doubled.

        Raises:
            DataError: ids of ``done`` and ``aside`` together are not exactly those of ``rows``.
        """
        if sorted([*done, *(q.id for q in aside)]) != sorted(self.ids(rows)):
            raise DataError(
                f"Rows {rows[0]} to {rows[-1]} of {self._manifest.root} were asked for; the reader's answer lacks or "
                "repeats some of them.",
                "Is the data set being rewritten? Index it again once it is at rest.",
            )


class Ids:
    """The ids of a manifest by slices of row numbers, each read when it is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._manifest.ids_of(range(*rows.indices(len(self._manifest))))


def from_failure(failure: Failure) -> Quarantined:
    """A reader's failure as a row of the quarantine."""
    return Quarantined(**asdict(failure))
