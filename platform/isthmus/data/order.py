"""Which sample stands where in training: a pure function of (seed, epoch, sample count, global batch).

Each epoch visits every sample exactly once in its own pseudo-random order. The order is a keyed permutation that is
*computed*, not stored: an alternating Feistel network over the smallest power of two that covers the samples, with
cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4). Any step of any epoch is
reached in the time of one batch whatever the number of samples, so a resumed run seeks instead of replaying, and no
rank holds an array of the length of the data.

The world size does not enter: rank r of w takes rows [r*G/w, (r+1)*G/w) of the one global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.errors import DataError

PADDING = -1
"""Row number of the padding that fills an epoch's last batch."""

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Order:
    """The sample order of a run.

    Attributes:
        samples: rows of the manifest, at least 1.
        global_batch: pairs per optimizer step over all ranks.
        seed: another seed, another order.
    """

    samples: int
    global_batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("The data set holds no samples, so no order can be drawn.", "Index a folder with samples.")
        if self.global_batch < 1:
            raise DataError(f"The global batch is {self.global_batch}.", "Set train.global_batch to 1 or more.")

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass; the last one is padded where the samples do not divide."""
        return -(-self.samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """Completed passes before ``step``."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Manifest rows of global step ``step``, int64 [G]; -1 marks padding."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.global_batch
        real = min(self.global_batch, self.samples - first)
        rows = np.full(self.global_batch, PADDING, dtype=np.int64)
        rows[:real] = self.permute(epoch, np.arange(first, first + real, dtype=np.int64))
        return rows

    def local(self, step: int, rank: int, world: int) -> np.ndarray:
        """Rank ``rank``'s part of :meth:`batch`, int64 [G/world]; the ranks' parts in order are the batch."""
        if self.global_batch % world:
            raise DataError(
                f"A global batch of {self.global_batch} does not divide among {world} ranks.",
                "Choose train.global_batch as a multiple of cluster.workers.",
            )
        share = self.global_batch // world
        return self.batch(step)[rank * share : (rank + 1) * share]

    def permute(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Manifest rows at ``positions`` of epoch ``epoch``'s order; both int64, positions in [0, samples)."""
        bits = max(1, (self.samples - 1).bit_length())
        low, high = bits // 2, bits - bits // 2
        keys = _round_keys(self.seed, epoch)
        values = _feistel(positions.astype(np.uint64), low, high, keys)
        # The network permutes [0, 2^bits). Values outside the samples are walked on along their cycle until they fall
        # inside; 2^bits < 2 * samples, so that takes two tries on average.
        outside = values >= np.uint64(self.samples)
        while outside.any():
            values[outside] = _feistel(values[outside], low, high, keys)
            outside = values >= np.uint64(self.samples)
        return values.astype(np.int64)


def mix(*words: int) -> int:
    """A 64-bit hash of integers (chained SplitMix64): the seed of anything that depends on (seed, sample, epoch)."""
    state = 0
    for word in words:
        state = int(_splitmix(np.asarray([(state ^ (word & _MASK64)) & _MASK64], dtype=np.uint64))[0])
    return state


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(mix(seed, epoch, number)) for number in range(_ROUNDS)]


def _feistel(values: np.ndarray, low: int, high: int, keys: list[np.uint64]) -> np.ndarray:
    """A permutation of [0, 2^(low+high)); rounds alternate which half is changed, so unequal halves are fine."""
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    left_mask, right_mask = np.uint64((1 << high) - 1), np.uint64((1 << low) - 1)
    for number, key in enumerate(keys):
        if number % 2:
            right = right ^ (_splitmix(left ^ key) & right_mask)
        else:
            left = left ^ (_splitmix(right ^ key) & left_mask)
    return (left << np.uint64(low)) | right


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood, 2014), elementwise on uint64 with wrap-around."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
