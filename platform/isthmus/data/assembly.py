"""The rows of all shards put together: in memory while they are few, in files once they are many.

Above :data:`PAGED_FROM` rows nothing is kept in memory but some 131,072 rows: ``manifest.parquet`` and its paged form
(:mod:`isthmus.data.pages`) are written as rows come, in a hidden folder beside the manifest (for an object store: in
``ISTHMUS_SCRATCH`` or the folder for temporary files), and brought to their place when the index is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data import pages
from isthmus.data.listing import TABLE_FILE
from isthmus.data.pages import PAGES_FILE, PageWriter
from isthmus.data.records import HEARD_SCHEMA, IMAGE_ID_COLUMN, SCHEMA, URI
from isthmus.data.rows import count_captioned, image_ids, integers

PAGED_FROM = 1 << 20
"""More rows than this are written in pages too."""

GROUP_ROWS = 1 << 17
"""Rows of a row group of the table, and rows that are written together."""

_TEXTS = ("image_ext", "text_ext", "audio_ext")
_ENCODINGS = {
    "id": "PLAIN",
    "image_id": "PLAIN",
    "key": "DELTA_BYTE_ARRAY",
    **{
        field.name: "DELTA_BINARY_PACKED"
        for field in HEARD_SCHEMA
        if field.name not in ("id", "image_id", "key", *_TEXTS)
    },
}
"""Of a large table. Neighbours differ little: two fifths smaller than by zstd alone, and several times as fast
to write."""


class Assembly:
    """Collects rows, answers what the index asks about all of them, and writes them. A context manager: what was not
    written is thrown away.

    Attributes:
        rows: how many there are.
        captioned: those with a caption.
        named_images: those that name their image's id.
        names_files: whether any names a file as its image.
        sounds: those with a sound file.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self.rows = self.captioned = self.named_images = self.sounds = 0
        self.names_files = False
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._files: _Files | None = None

    def __enter__(self) -> Assembly:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._files is not None:
            self._files.remove()

    @property
    def paged(self) -> bool:
        """Whether there are so many that they are written in pages too."""
        return self._files is not None

    def add(self, table: pa.Table, shard: int) -> None:
        """Append the rows of shard number ``shard``, columns of :func:`isthmus.data.records.schema_of`."""
        at = SCHEMA.get_field_index("shard")
        numbers = pa.repeat(pa.scalar(shard, pa.int32()), len(table))
        self.append(table.set_column(at, SCHEMA.field("shard"), numbers))

    def append(self, table: pa.Table) -> None:
        """Append rows that have their shard's number."""
        self.rows += len(table)
        self.captioned += count_captioned(table)
        self.named_images += len(table) - table[IMAGE_ID_COLUMN].null_count
        if "audio_length" in table.column_names:
            self.sounds += len(table) - table["audio_length"].null_count
        self.names_files = self.names_files or bool(pc.any(pc.equal(table["image_ext"], URI)).as_py())
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._files is None and self.rows > PAGED_FROM:
            self._files = _Files(self._root, self._schema)
        if self._files is not None and self._files.schema != self._schema:
            self._files = self._files.widened(self._root, self._schema)
        if self._files is not None and self._waiting_rows >= GROUP_ROWS:
            self._flush(self._waiting_rows // GROUP_ROWS * GROUP_ROWS)

    @property
    def _schema(self) -> pa.Schema:
        """Columns for sounds are written only where there are any: they would take room in every page."""
        return HEARD_SCHEMA if self.sounds else SCHEMA

    def complete(self) -> None:
        """Call it behind the last rows, before asking anything of them."""
        if self._files is not None:
            self._flush(self._waiting_rows)
            self._files.table.close()
        else:  # in one piece, so that equal rows are equal bytes however they were come by
            self._waiting = [self._joined()]

    def _joined(self) -> pa.Table:
        """What waits, as one table; columns that some of it lacks are null there."""
        tables = [self._schema.empty_table(), *self._waiting]
        return pa.concat_tables(tables, promote_options="default").combine_chunks()

    def column(self, name: str) -> Iterator[np.ndarray]:
        """A column of integers, nulls as -1, piece by piece."""
        return (integers(batch[name]) for batch in self._batches([name]))

    def twins(self) -> list[dict[str, Any]]:
        """Shard and key of two rows of one id; none where all ids differ. Holds the ids of all rows in memory."""
        value = _repeated(self.column("id"), self.rows)
        if value is None:
            return []
        same: list[dict[str, Any]] = []
        for batch in self._batches(["id", "shard", "key"]):
            same += batch.filter(pc.equal(batch["id"], value)).to_pylist()
        return same[:2]

    def repeats_images(self) -> bool:
        """Whether two samples have the same image id. Holds the ids of all rows in memory where any image is named."""
        if not self.named_images:  # each is its sample's id, and those differ
            return False
        columns = ["id", IMAGE_ID_COLUMN]
        pieces = (image_ids(pa.Table.from_batches([batch])) for batch in self._batches(columns))
        return _repeated(pieces, self.rows) is not None

    def write(self, digest: str) -> tuple[dict[str, Any], bytes]:
        """Write the table, and the pages of a large one.

        Returns:
            (what is to be added to ``manifest.json``: ``pages``, where there are any; the table's bytes, where it is
            not paged)
        """
        if self._files is None:
            sink = pa.BufferOutputStream()
            pq.write_table(self._waiting[0], sink, compression="zstd", row_group_size=GROUP_ROWS)
            data: bytes = sink.getvalue().to_pybytes()
            storage.write_bytes(storage.join(self._root, TABLE_FILE), data)
            return {}, data
        facts = {"bytes": 0, "captioned": self.captioned, "repeated_images": self.repeats_images()}
        facts["bytes"] = self._files.pages.finish(digest)
        storage.move_file(self._files.table_path, storage.join(self._root, TABLE_FILE))
        storage.move_file(self._files.pages_path, storage.join(self._root, PAGES_FILE))
        return {"pages": facts}, b""

    def _flush(self, rows: int) -> None:
        assert self._files is not None
        table = self._joined()
        for start in range(0, rows, GROUP_ROWS):
            self._files.write(table.slice(start, min(GROUP_ROWS, rows - start)).combine_chunks())
        rest = table.slice(rows)
        self._waiting, self._waiting_rows = [rest], len(rest)

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if self._files is None:
            yield from self._waiting[0].select(list(columns)).to_batches()
        else:
            with pq.ParquetFile(self._files.table_path) as file:
                yield from file.iter_batches(GROUP_ROWS, columns=list(columns), use_threads=False)


class _Files:
    """The two files while they are being written."""

    def __init__(self, root: str, schema: pa.Schema) -> None:
        self.folder, self.schema = _folder_for(root), schema
        self.table_path, self.pages_path = self.folder / f".{TABLE_FILE}", self.folder / f".{PAGES_FILE}"
        self.table = table_writer(self.table_path, schema)
        self.pages = PageWriter(self.pages_path, pages.PAGE_ROWS, schema)

    def write(self, table: pa.Table) -> None:
        self.table.write_table(table, row_group_size=GROUP_ROWS)
        self.pages.write(table)

    def widened(self, root: str, schema: pa.Schema) -> _Files:
        """New files with more columns and the rows of these, which are removed."""
        wider = _Files(root, schema)
        self.table.close()
        with pq.ParquetFile(self.table_path) as file:
            for group in range(file.num_row_groups):
                rows = [schema.empty_table(), file.read_row_group(group)]
                wider.write(pa.concat_tables(rows, promote_options="default").combine_chunks())
        self.remove()
        return wider

    def remove(self) -> None:
        self.table.close()
        self.pages.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def table_writer(path: Path, schema: pa.Schema = SCHEMA) -> pq.ParquetWriter:
    """A writer of a large ``manifest.parquet``."""
    names = set(schema.names)
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[name for name in _TEXTS if name in names],
        column_encoding={name: encoding for name, encoding in _ENCODINGS.items() if name in names},
    )


def _folder_for(root: str) -> Path:
    """A new folder for files that will be moved below ``root``."""
    if storage.is_local(root):
        storage.make_dirs(root)
        return Path(tempfile.mkdtemp(prefix=".isthmus-index-", dir=storage.local_path(root)))
    if scratch := os.environ.get("ISTHMUS_SCRATCH"):
        Path(scratch).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="isthmus-index-", dir=scratch))


def _repeated(pieces: Iterator[np.ndarray], rows: int) -> int | None:
    """The least value that occurs more than once, or None."""
    values = np.empty(rows, np.int64)
    at = 0
    for piece in pieces:
        values[at : at + len(piece)] = piece
        at += len(piece)
    values.sort()
    again = np.flatnonzero(values[1:] == values[:-1])
    return int(values[again[0]]) if len(again) else None
