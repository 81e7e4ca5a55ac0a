"""Unit vectors of samples, for scoring against classes: read from an embedding job's output, or made of captions.

B samples of a group, M vectors of theirs (captions, or an image's queries), E width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.alignment.features import CaptionEncoder, fixed_rows, read_captions
from isthmus.data.manifest import Manifest
from isthmus.errors import DataError
from isthmus.inference.commits import PARTS, QUARANTINE, Quarantined
from isthmus.inference.embed import TEXTS

GROUP = 4096  # captions that are scored at once
DECIMALS = 5
"""Of a score. A product rounds a row by its place in the block, an encoder by the texts beside it: without this, equal
captions would differ by the cut into chunks and batches, and ties would not go by id. (One whose score lies within an
encoder's rounding, some 1e-7, of the border between two values still may.)"""


@dataclass(frozen=True)
class Group:
    """Samples with one vector or more each.

    Attributes:
        ids_B: int64.
        vectors_ME: unit vectors, float32, sample by sample.
        starts_B: where each sample's vectors begin.
    """

    ids_B: np.ndarray
    vectors_ME: np.ndarray
    starts_B: np.ndarray

    def scores(self, prototypes_KE: np.ndarray) -> np.ndarray:
        """float32 [B, K]: the largest cosine over a sample's vectors, to :data:`DECIMALS`."""
        scores_MK = self.vectors_ME.astype(np.float64) @ prototypes_KE.T.astype(np.float64)
        if not np.isfinite(scores_MK).all():
            raise DataError("Some vectors are not finite numbers.", "The model that made them is broken; retrain it.")
        best: np.ndarray = np.maximum.reduceat(scores_MK, self.starts_B, axis=0)
        return best.round(DECIMALS).astype(np.float32)


class Vectors(Protocol):
    """Vectors of manifest rows."""

    def read(self, rows: Sequence[int]) -> Iterator[Group | list[Quarantined]]:
        """Every one of ``rows`` once: in a group, or among what is set aside."""
        ...


class Encoded:
    """Captions, encoded as they are read."""

    def __init__(self, encode: CaptionEncoder, manifest: Manifest) -> None:
        self._encode, self._manifest = encode, manifest

    def read(self, rows: Sequence[int]) -> Iterator[Group | list[Quarantined]]:
        for first in range(0, len(rows), GROUP):
            samples, aside = read_captions(self._manifest, rows[first : first + GROUP])
            if samples:
                texts = [text for sample in samples for text in sample.captions]
                place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
                vectors = self._encode(list(place))[[place[text] for text in texts]]
                counts = [len(sample.captions) for sample in samples]
                yield Group(np.array([s.id for s in samples]), vectors, np.cumsum([0, *counts[:-1]]))
            yield aside


@dataclass(frozen=True)
class Embedded:
    """The output of `isthmus embed`.

    Attributes:
        url: its folder. chunk: rows of a part. model: digest of the model. manifest_digest: of the data.
        side: ``texts`` or ``images``.
    """

    url: str
    chunk: int
    model: str
    manifest_digest: str
    side: str

    @classmethod
    def open(cls, url: str, side: str) -> Embedded:
        """A finished job's output.

        Raises:
            DataError: unfinished, of another kind, or without the vectors that are asked for.
        """
        if not storage.exists(storage.join(url, "report.json")):
            raise DataError(f"{url} holds no finished embedding job.", "Run `isthmus embed`, or run it to its end.")
        job = json.loads(storage.read_bytes(storage.join(url, "job.json")))
        if job.get("kind") != "embed":
            raise DataError(f"{url} is the output of a job of kind '{job.get('kind')}'.", "Name the 'out' of an embed.")
        facts = job["facts"]
        if not facts[side]:
            raise DataError(f"{url} holds no vectors of {side}.", f"Run `isthmus embed` with {side}=true.")
        return cls(url, int(facts["chunk"]), str(facts["model"]), str(facts["manifest"]), side)

    def part(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Quarantined]]:
        """(ids [B], vectors [M, E] of samples in that order, vectors of each [B], what was set aside) of a part."""
        name = f"part-{index:06d}.parquet"
        ids = self._read(f"{PARTS}/{name}", ["id"])["id"].to_numpy()
        if self.side == "images":
            nested = self._read(f"{PARTS}/{name}", ["embeddings"])["embeddings"].combine_chunks()
            vectors, counts = fixed_rows(pa.chunked_array([nested.flatten()])), np.diff(nested.offsets.to_numpy())
        else:
            table = self._read(f"{TEXTS}/{name}", ["id", "embedding"])
            by_id = np.argsort(ids)
            place_M = by_id[np.searchsorted(ids, table["id"].to_numpy(), sorter=by_id)]
            vectors = fixed_rows(table["embedding"])[np.argsort(place_M, kind="stable")]
            counts = np.bincount(place_M, minlength=len(ids))
        aside = storage.join(self.url, QUARANTINE, name)
        rows = self._read(f"{QUARANTINE}/{name}").to_pylist() if storage.exists(aside) else []
        return ids, vectors, counts, [Quarantined(**row) for row in rows]

    def _read(self, name: str, columns: list[str] | None = None) -> Any:
        return pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self.url, name))), columns=columns)


class Stored:
    """Vectors of an embedding job, part by part."""

    def __init__(self, embedded: Embedded, manifest: Manifest) -> None:
        self._embedded, self._manifest = embedded, manifest

    def read(self, rows: Sequence[int]) -> Iterator[Group | list[Quarantined]]:
        if not len(rows):
            return
        rows_N, chunk = np.sort(np.asarray(rows, np.int64)), self._embedded.chunk
        for index in np.unique(rows_N // chunk).tolist():
            first, last = np.searchsorted(rows_N, (index * chunk, (index + 1) * chunk))
            wanted = self._manifest.ids_of(rows_N[first:last].tolist())
            ids, vectors, counts, aside = self._embedded.part(index)
            mine_B = np.isin(ids, wanted) & (counts > 0)
            if mine_B.any():
                kept = counts[mine_B]
                yield Group(ids[mine_B], vectors[np.repeat(mine_B, counts)], np.cumsum([0, *kept[:-1]]))
            bare = ids[np.isin(ids, wanted) & (counts == 0)]
            asked = set(wanted.tolist())
            yield [q for q in aside if q.id in asked] + [_without(i) for i in bare.tolist()]


def _without(sample_id: int) -> Quarantined:
    return Quarantined(sample_id, "", "", -1, "it has no caption, so no vector")
