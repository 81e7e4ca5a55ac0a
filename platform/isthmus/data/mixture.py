"""Which row of which data set stands where in training on several: shares that hold after every single row.

The sets take turns in a sequence that is the same for ever: after any number of rows, each set has given its share of
them to within less than one. So has every worker's part of a batch, to within less than two, and the sets are mixed
evenly along a batch. A set's own rows follow in the set's own :class:`~isthmus.data.order.Order`, pass after pass and
without padding, each pass as long as that set is.

Everything is a function of (seed, step, sizes, weights, global batch, pool): a step is reached by arithmetic.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.config import DataConfig, whole_weights
from isthmus.data.order import CHUNK, LEAST_SPAN, MOST_STREAMS, PADDING, Order, SampleOrder, local_part, mix

log = logging.getLogger(__name__)

_LEAST_POOL = 16 * CHUNK
"""Samples of a set that are mixed at least: with fewer chunks, neighbours in the shards would stay neighbours."""


@dataclass(frozen=True)
class MixtureOrder:
    """The sample order of a run over several data sets. Row numbers count through the sets, one behind the other.

    Attributes:
        sizes: samples of each set, at least 1.
        weights: whole numbers, the sets' shares.
        global_batch, seed: as of :class:`~isthmus.data.order.Order`.
        pool: samples that are mixed at a time, of all sets together; each has its share of them.
    """

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    global_batch: int
    seed: int = 0
    pool: int = 16384

    @property
    def samples(self) -> int:
        """Rows of all sets."""
        return sum(self.sizes)

    @property
    def span(self) -> int:
        """Steps that are best read together: about a pool of rows."""
        return max(LEAST_SPAN, self.pool // self.global_batch)

    def span_end(self, step: int) -> int:
        """The step at which the rows that are best read with those of ``step`` end."""
        return (step // self.span + 1) * self.span

    def epoch_of(self, step: int) -> int:
        """How often as many rows as all sets have were read before ``step``. Each set's passes are its own."""
        return step * self.global_batch // self.samples

    def batch(self, step: int) -> np.ndarray:
        """Row numbers of global step ``step``, int64 [G]."""
        return _rows_and_visits(self, step)[0]

    def local(self, step: int, rank: int, world: int) -> np.ndarray:
        """Rank ``rank``'s part of :meth:`batch`, int64 [G/world]."""
        return local_part(self.batch(step), rank, world)

    def visits(self, step: int, rank: int, world: int) -> np.ndarray:
        """How often the set of each of these rows had been gone through before, int64 [G/world]."""
        return local_part(_rows_and_visits(self, step)[1], rank, world)

    def counts(self, rows: int) -> np.ndarray:
        """Rows of each set among the first ``rows`` of the run, int64 [sets]."""
        periods, rest = divmod(rows, sum(self.weights))
        turns, _ = _turns(self.weights)
        return np.asarray(self.weights) * periods + np.bincount(turns[:rest], minlength=len(self.weights))

    def order(self, number: int) -> Order:
        """A set's own order. Its batch is about what the set gives to a step, so that its spans are about ours."""
        part = self.weights[number] / sum(self.weights)
        share = max(1, round(part * self.global_batch))
        share = share // MOST_STREAMS * MOST_STREAMS or share
        pool = max(math.ceil(part * self.pool), min(self.pool, _LEAST_POOL))
        return Order(self.sizes[number], min(share, self.sizes[number]), mix(self.seed, number), pool)


def order_of(data: DataConfig, sizes: Sequence[int], global_batch: int, seed: int) -> SampleOrder:
    """The order of a run over data sets of ``sizes`` samples."""
    if data.mixture is None:
        return Order(sizes[0], global_batch, seed, data.shuffle_pool)
    weights = whole_weights([one.weight for one in data.mixture])
    return MixtureOrder(tuple(sizes), weights, global_batch, seed, data.shuffle_pool)


def warn_of_repeats(data: DataConfig, order: SampleOrder) -> None:
    """Says which sets of a mixture are smaller than what they give to one batch."""
    if not isinstance(order, MixtureOrder):
        return
    for one, size, rows in zip(data.sets, order.sizes, order.counts(order.global_batch).tolist(), strict=True):
        if rows > size:
            log.warning(
                "%s has %d samples, and its weight gives it %d rows of each global batch: batches hold samples more "
                "than once, and a contrast takes them for different ones. Lower its weight or train.global_batch.",
                one.url,
                size,
                rows,
            )


def passes(data: DataConfig, sizes: Sequence[int], rows: int) -> dict[str, float]:
    """What is logged of a mixture after ``rows`` rows: passes over all sets as ``epoch``, over each as ``epoch_NAME``.

    Empty for a single data set, whose passes are the batches' epochs.
    """
    if data.mixture is None:
        return {}
    weights = whole_weights([one.weight for one in data.mixture])
    each = zip(names([one.url for one in data.mixture]), weights, sizes, strict=True)
    return {"epoch": rows / sum(sizes)} | {f"epoch_{n}": rows * w / sum(weights) / size for n, w, size in each}


def names(urls: Sequence[str]) -> list[str]:
    """A short name for each of different URLs: its last parts, as many as it takes to tell them apart."""
    parts = [[re.sub(r"[^\w.-]", "-", part) for part in url.split("/") if part] for url in urls]
    for depth in range(1, max(map(len, parts)) + 1):
        shown = ["_".join(of[-depth:]) for of in parts]
        if len(set(shown)) == len(shown):
            return shown
    return [str(number) for number in range(len(urls))]


@functools.lru_cache(maxsize=64)
def _rows_and_visits(mixture: MixtureOrder, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, visits before) of a step, int64 [G] each. Reading, decoding and naming rows ask for the same."""
    turns, before = _turns(mixture.weights)
    periods, places = np.divmod(mixture.global_batch * step + np.arange(mixture.global_batch), len(turns))
    rows, visits = np.empty_like(places), np.empty_like(places)
    for number, weight in enumerate(mixture.weights):
        [own] = np.nonzero(turns[places] == number)
        if len(own):
            first = int(periods[own[0]]) * weight + int(before[places[own[0]]])
            found, visits[own] = _walk(mixture.order(number), first, len(own))
            rows[own] = sum(mixture.sizes[:number]) + found
    rows.flags.writeable = visits.flags.writeable = False  # they are shared
    return rows, visits


def _walk(order: Order, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, passes) of ``count`` places from place ``first`` of the endless sequence of a set's passes."""
    rows, visits = [], []
    while count:
        visit, place = divmod(first, order.samples)
        step, offset = divmod(place, order.global_batch)
        some = _real_rows(order, visit * order.steps_per_epoch + step)[offset : offset + count]
        rows.append(some)
        visits.append(np.full(len(some), visit))
        first, count = first + len(some), count - len(some)
    return np.concatenate(rows), np.concatenate(visits)


@functools.lru_cache(maxsize=64)
def _real_rows(order: Order, step: int) -> np.ndarray:
    """The batch without the padding, which only a pass's last batch has."""
    rows = order.batch(step)
    return rows[rows != PADDING]


@functools.lru_cache(maxsize=4)
def _turns(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(set, rows of that set before) at each place of the sequence in which the sets take turns.

    The sequence is as long as the weights' sum, and its counts are then the weights themselves, so it repeats. The set
    takes a turn that must have its next row soonest, of those that have not had more than their share: this keeps all
    of them within less than one row of it at every place (Baruah et al., "Proportionate progress", Algorithmica 15,
    1996). Shares of a place that are merely rounded to add up do not do: some counts would have to go down again.
    """
    total, sets = sum(weights), range(len(weights))
    common = math.lcm(*weights)
    waits = [common // weight for weight in weights]  # time from row to row of a set, in exact units
    turns, before, counts = [], [], [0] * len(weights)
    for place in range(1, total + 1):
        due = (number for number in sets if counts[number] * total < weights[number] * place)
        turn = min(due, key=lambda number: (counts[number] + 1) * waits[number])
        turns.append(turn)
        before.append(counts[turn])
        counts[turn] += 1
    return np.asarray(turns), np.asarray(before)
