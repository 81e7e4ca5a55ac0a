"""A choice of samples as a data set of its own: another manifest over the same shards, of which nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from isthmus import storage
from isthmus.data.assembly import GROUP_ROWS, Assembly
from isthmus.data.listing import HEADER_FILE
from isthmus.data.manifest import Manifest, digest_of, header_of, write
from isthmus.data.records import IMAGE_ID_COLUMN, SCHEMA, schema_of
from isthmus.data.uris import store_of
from isthmus.errors import DataError


def write_subset(manifest: Manifest, rows: Sequence[int] | np.ndarray, out: str) -> Manifest:
    """Writes the manifest of some samples to ``out``; training, embedding, evaluating and so on take it as ``data``.

    Samples keep their ids, so a feature cache of the whole set serves its subset too. The shards stay where they are
    and are named by their URLs.

    Args:
        manifest: of the whole set.
        rows: row numbers in any order, each once.
        out: a folder or URL that holds no other data set.

    Raises:
        DataError: no rows, a row twice, or ``out`` is a data set that is no subset.
    """
    chosen = np.sort(np.asarray(rows, np.int64))
    if not len(chosen) or (np.diff(chosen) == 0).any():
        raise DataError(f"A subset of {manifest.root} needs at least one row, and each once.")
    refuse_to_overwrite(out)
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    counts = np.diff(np.searchsorted(chosen, starts))
    kept = np.flatnonzero(counts)
    numbered = [(manifest.shards[i], manifest.url(i), int(counts[i])) for i in kept.tolist()]
    shards = [replace(shard, name=_absolute(url), samples=count) for shard, url, count in numbered]
    with Assembly(out) as table:
        for first in range(0, len(chosen), GROUP_ROWS):
            table.append(_renumbered(manifest.take(chosen[first : first + GROUP_ROWS]), kept))
        table.complete()
        digest = digest_of(shards, table.column, table.sounds > 0)
        places = sorted({*manifest.places, *manifest.images_from} - {store_of(out)})
        header = header_of(shards, table.rows, digest, images_from=places if table.names_files else ())
        write(out, table, header | {"subset_of": {"url": _absolute(manifest.root), "digest": manifest.digest}})
    return Manifest.load(out)


def refuse_to_overwrite(out: str) -> None:
    """Raises DataError where ``out`` is a data set that is no subset of another."""
    if storage.exists(storage.join(out, HEADER_FILE)) and not Manifest.load(out, verify=False).subset_of:
        raise DataError(f"{out} holds an index that is not a subset of another.", "Choose another folder.")


def _absolute(url: str) -> str:
    return str(storage.local_path(url).absolute()) if storage.is_local(url) else url


def _renumbered(table: pa.Table, kept: np.ndarray) -> pa.Table:
    """Rows with the numbers of the shards that are kept, and with every column of today's manifests."""
    at = table.column_names.index("shard")
    shard = np.searchsorted(kept, table["shard"].to_numpy())
    table = table.set_column(at, SCHEMA.field("shard"), pa.array(shard, pa.int32()))
    if IMAGE_ID_COLUMN not in table.column_names:
        table = table.append_column(SCHEMA.field(IMAGE_ID_COLUMN), pa.nulls(len(table), pa.int64()))
    return table.select(schema_of(table.column_names).names).cast(schema_of(table.column_names))
