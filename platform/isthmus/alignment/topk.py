"""The best candidates of each class, kept while samples stream by, and samples handed out to classes from them.

Maniparambil et al. (2024) keep the best 50,000 captions of a class and serve the rarest class first: the one whose
score at a given rank is the lowest. Scores stay float32: quantised to 8 bits, as in the paper's scripts, the best ones
overflow. Equal scores go by sample id, so that neither the order of the samples nor the cut into chunks matters.

K classes, B samples of a batch, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

HELD = 1 << 22  # candidates that wait before the best are chosen among them

SCHEMA = pa.schema([("class", pa.int32()), ("id", pa.int64()), ("score", pa.float32())])


@dataclass(frozen=True)
class Candidates:
    """Candidates by class, then falling score, then id.

    Attributes:
        class_C, id_C, score_C: int32, int64, float32.
    """

    class_C: np.ndarray
    id_C: np.ndarray
    score_C: np.ndarray

    @classmethod
    def none(cls) -> Candidates:
        """No candidates."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))

    @classmethod
    def of(cls, table: pa.Table) -> Candidates:
        """Back from :meth:`table`."""
        return cls(*(table[name].to_numpy() for name in SCHEMA.names))

    def table(self) -> pa.Table:
        """Columns class, id, score."""
        return pa.table([self.class_C, self.id_C, self.score_C], schema=SCHEMA)

    def starts(self, classes: int) -> np.ndarray:
        """Where each class begins, and the end: int64 [K + 1]."""
        return np.searchsorted(self.class_C, np.arange(classes + 1))


def best(found: Iterable[Candidates], top: int) -> Candidates:
    """The ``top`` candidates of each class. Associative: the best of the best of parts are the best of all."""
    some = [one for one in found if len(one.id_C)]
    if not some:
        return Candidates.none()
    class_C, id_C, score_C = (np.concatenate([getattr(one, n) for one in some]) for n in ("class_C", "id_C", "score_C"))
    order = np.lexsort((id_C, -score_C, class_C))
    class_C = class_C[order]
    rank_C = np.arange(len(order)) - np.searchsorted(class_C, class_C)
    kept = rank_C < top
    return Candidates(class_C[kept], id_C[order][kept], score_C[order][kept])


class Collector:
    """The best candidates of what has streamed by, in memory for K x ``top`` of them and some that wait.

    Args:
        classes: K.
        top: candidates of a class.
        nearest: classes that a sample is a candidate of, the nearest ones; None: all.
        least: score below which a sample is no candidate; None: none is.
    """

    def __init__(self, classes: int, top: int, nearest: int | None = None, least: float | None = None) -> None:
        self._top, self._nearest = top, min(nearest or classes, classes)
        self._floor_K = np.full(classes, -np.inf if least is None else least, np.float32)
        self._kept, self._waiting, self._held = Candidates.none(), list[Candidates](), 0

    def add(self, ids_B: np.ndarray, scores_BK: np.ndarray) -> None:
        """Samples with their scores, float32."""
        admitted_BK = scores_BK >= self._floor_K
        if self._nearest < scores_BK.shape[1]:
            # The k-th largest of a row; classes that tie with it are candidates too, whatever their number.
            least_B = -np.partition(-scores_BK, self._nearest - 1, axis=1)[:, self._nearest - 1]
            admitted_BK &= scores_BK >= least_B[:, None]
        row, column = np.nonzero(admitted_BK)
        self._waiting.append(Candidates(column.astype(np.int32), ids_B[row], scores_BK[row, column]))
        self._held += len(row)
        if self._held >= HELD:
            self._settle()

    def result(self) -> Candidates:
        """The best so far."""
        self._settle()
        return self._kept

    def _settle(self) -> None:
        self._kept = best([self._kept, *self._waiting], self._top)
        self._waiting, self._held = [], 0
        starts = self._kept.starts(len(self._floor_K))
        full = np.flatnonzero(np.diff(starts) == self._top)
        self._floor_K[full] = self._kept.score_C[starts[full + 1] - 1]  # an equal score may still win by its id


@dataclass(frozen=True)
class Assignment:
    """Which sample went to which class.

    Attributes:
        chosen: the samples of each class, each sample once.
        order_K: classes as they were served.
        cut_K: score of each class at the cut rank; -inf where it has fewer candidates.
    """

    chosen: Candidates
    order_K: np.ndarray
    cut_K: np.ndarray


def assign(found: Candidates, classes: int, per_class: int, cut_rank: int) -> Assignment:
    """Samples for each class, the class with the lowest score at ``cut_rank`` first.

    Among classes that have fewer candidates the one with the fewest is first; then the number of the class decides.
    """
    starts = found.starts(classes)
    count_K = np.diff(starts)
    cut_K = np.full(classes, -np.inf, np.float32)
    enough = np.flatnonzero(count_K >= cut_rank)
    cut_K[enough] = found.score_C[starts[enough] + cut_rank - 1]
    order_K = np.lexsort((np.arange(classes), count_K, cut_K))
    ids, place_C = np.unique(found.id_C, return_inverse=True)
    free = np.ones(len(ids), bool)
    mine = list[np.ndarray]()
    for number in order_K.tolist():
        own = np.arange(starts[number], starts[number + 1])
        own = own[free[place_C[own]]][:per_class]
        free[place_C[own]] = False
        mine.append(own)
    taken = np.sort(np.concatenate(mine)) if mine else np.zeros(0, np.int64)
    chosen = Candidates(found.class_C[taken], found.id_C[taken], found.score_C[taken])
    return Assignment(chosen, order_K, cut_K)
