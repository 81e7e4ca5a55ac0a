"""How the rows of a manifest are had: a table in memory, or pages of a file (:class:`isthmus.data.pages.Pages`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from isthmus.data.records import IMAGE_ID_COLUMN


class Rows(Protocol):
    """Rows with the columns of :data:`isthmus.data.records.SCHEMA`, by number."""

    def __len__(self) -> int: ...

    @property
    def column_names(self) -> list[str]:
        """Names of the columns. Manifests of earlier versions have no ``image_id``."""
        ...

    @property
    def captioned(self) -> int:
        """Samples that have a caption."""
        ...

    @property
    def repeated_images(self) -> bool:
        """Whether two samples have the same image id."""
        ...

    def take(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows ``numbers`` in that order, with ``columns`` or all of them; IndexError for one that there is not."""
        ...

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in memory, with ``columns`` or all of them."""
        ...

    def column(self, name: str) -> np.ndarray:
        """A whole column of integers, in memory; nulls are -1."""
        ...


class Whole:
    """Rows that are in memory as one table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @property
    def column_names(self) -> list[str]:
        return list(self._table.column_names)

    @functools.cached_property
    def captioned(self) -> int:
        return count_captioned(self._table)

    @functools.cached_property
    def repeated_images(self) -> bool:
        return len(np.unique(image_ids(self._table))) < len(self._table)

    def take(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        return self.whole(columns).take(pa.array(numbers, pa.int64()))

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self._table if columns is None else self._table.select(list(columns))

    def column(self, name: str) -> np.ndarray:
        return integers(self._table[name])


def image_ids(table: pa.Table) -> np.ndarray:
    """Id of each row's image, int64: equal where the data says so, else the sample's own id."""
    if IMAGE_ID_COLUMN not in table.column_names:
        return table["id"].to_numpy()
    return pc.coalesce(table[IMAGE_ID_COLUMN], table["id"]).to_numpy()


def integers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of integers, nulls as -1."""
    return (column.fill_null(-1) if column.null_count else column).to_numpy(zero_copy_only=False)


def count_captioned(table: pa.Table) -> int:
    """Rows that have a caption."""
    return int(pc.sum(pc.not_equal(table["text_ext"], "")).as_py() or 0)
