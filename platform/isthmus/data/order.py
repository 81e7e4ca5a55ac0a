"""Which sample stands where in training: a pure function of (seed, epoch, sample count, global batch, pool).

Each epoch visits every sample exactly once. Its order is *computed*, not stored, so any step of any epoch is reached in
the time of one batch whatever the number of samples; a resumed run seeks instead of replaying.

The epoch is a sequence of chunks, runs of neighbouring rows, in a pseudo-random order. The sequence is cut into equal
canonical streams, whose number depends on the global batch alone. A global batch takes the same number of rows of each
stream in turn, and the rows that a stream gives over a span of steps, its block, are shuffled among one another. So:

- the world size does not enter: rank r of w takes rows [r*G/w, (r+1)*G/w) of the one global batch, G/w rounded up;
- the rows of a span are whole chunks but for those at a block's ends, hence few long reads from the store;
- about ``pool`` samples at a time are mixed; a set no larger than that is shuffled sample by sample.

Both shuffles are alternating Feistel networks over the smallest power of two that covers their domain, with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isthmus.errors import DataError

PADDING = -1
"""Row number of the padding in an epoch's last batch."""

CHUNK = 64
"""Neighbouring rows that stay together until the block shuffle. With images of 50 kB one read fetches 3 MB."""

MOST_STREAMS = 64
LEAST_SPAN = 8

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class SampleOrder(Protocol):
    """What reading asks of the order of a run, over one data set (:class:`Order`) or several."""

    @property
    def samples(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def span(self) -> int: ...

    def span_end(self, step: int) -> int: ...

    def epoch_of(self, step: int) -> int: ...

    def local(self, step: int, rank: int, world: int) -> np.ndarray: ...

    def visits(self, step: int, rank: int, world: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Order:
    """The sample order of a run.

    Attributes:
        samples: rows of the manifest, at least 1.
        global_batch: pairs per optimizer step over all ranks.
        seed: another seed, another order.
        pool: samples that are mixed with one another at a time, over all streams.
    """

    samples: int
    global_batch: int
    seed: int = 0
    pool: int = 16384

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("The data set holds no samples, so no order can be drawn.", "Index a folder with samples.")
        if self.global_batch < 1:
            raise DataError(f"The global batch is {self.global_batch}.", "Set train.global_batch to 1 or more.")

    @functools.cached_property
    def streams(self) -> int:
        """Canonical streams: the largest divisor of the global batch up to :data:`MOST_STREAMS`."""
        return max(s for s in range(1, min(self.global_batch, MOST_STREAMS) + 1) if self.global_batch % s == 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each data set, which is one."""
        return (self.samples,)

    @property
    def chunk(self) -> int:
        """Neighbouring rows that are visited within one block."""
        return CHUNK if self.samples > self.pool else 1

    @property
    def span(self) -> int:
        """Steps over which each stream shuffles its rows. Not too few: what is read together must not stay together."""
        return max(LEAST_SPAN, self.pool // self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass; the last one is padded where the samples do not divide."""
        return -(-self.samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """Completed passes before ``step``."""
        return step // self.steps_per_epoch

    def span_end(self, step: int) -> int:
        """The step at which the block shuffle of ``step`` ends: rows of steps before it are neighbours."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.steps_per_epoch + min((within // self.span + 1) * self.span, self.steps_per_epoch)

    def batch(self, step: int) -> np.ndarray:
        """Manifest rows of global step ``step``, int64 [G], stream after stream; -1 marks padding."""
        epoch, within = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.streams
        numbers = np.arange(self.streams + 1, dtype=object) * self.samples // self.streams
        begin, end = numbers[:-1].astype(np.int64), numbers[1:].astype(np.int64)
        block = within // self.span
        begin = begin + block * self.span * share
        length_S1 = np.minimum(end - begin, self.span * share)[:, None]
        first = within % self.span * share
        asked_Sg = np.broadcast_to(np.arange(first, first + share, dtype=np.int64), (self.streams, share))
        real_Sg = asked_Sg < length_S1
        keys_RS1 = _keys(self.seed, epoch, 1 + block, self.streams)[:, :, None]
        shuffled_Sg = _permute(np.where(real_Sg, asked_Sg, 0), np.maximum(length_S1, 1), keys_RS1)
        rows = np.full(asked_Sg.shape, PADDING, dtype=np.int64)
        rows[real_Sg] = self._rows(epoch, (begin[:, None] + shuffled_Sg)[real_Sg])
        return rows.reshape(-1)

    def local(self, step: int, rank: int, world: int) -> np.ndarray:
        """Rank ``rank``'s part of :meth:`batch`, int64 [ceil(G/world)]; the ranks' parts in order are the batch."""
        return local_part(self.batch(step), rank, world)

    def visits(self, step: int, rank: int, world: int) -> np.ndarray:
        """How often each row of :meth:`local` was visited before, int64 [G/world]."""
        return local_part(np.full(self.global_batch, self.epoch_of(step)), rank, world)

    def _rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Manifest rows at ``positions`` of the epoch's sequence of chunks."""
        chunks = -(-self.samples // self.chunk)
        keys = _keys(self.seed, epoch, 0, 1)
        # All chunks have one size but the manifest's last; every position after its place is shifted by what it lacks.
        short = self.samples - (chunks - 1) * self.chunk
        place = int(_unpermute(chunks - 1, chunks, keys[:, 0]))
        behind = positions >= place * self.chunk + short
        shifted = positions + np.where(behind, self.chunk - short, 0)
        slots, inside = np.divmod(shifted, self.chunk)
        return _permute(slots, np.asarray([chunks]), keys) * self.chunk + inside


def local_part(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Rank ``rank``'s part of a global batch [G], [ceil(G/world)].

    Where the batch does not divide, as while an elastic run has lost a node, the last parts end in padding.
    """
    share = -(-len(batch) // world)
    part = batch[rank * share : (rank + 1) * share]
    return np.pad(part, (0, share - len(part)), constant_values=PADDING)


def mix(*words: int) -> int:
    """A 64-bit hash of integers (chained SplitMix64): the seed of anything that depends on (seed, sample, epoch)."""
    state = 0
    for word in words:
        state = _hash((state ^ (word & _MASK64)) & _MASK64)
    return state


def _keys(seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """Round keys of ``count`` networks, uint64 [rounds, count]."""
    base = np.asarray([mix(seed, epoch, purpose, number) for number in range(_ROUNDS)], dtype=np.uint64)
    return _splitmix(base[:, None] ^ _splitmix(np.arange(count, dtype=np.uint64)))


def _permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``values`` permuted in [0, ``sizes``), both int64 and alike in all but their last dimension or broadcastable.

    The network permutes [0, 2^bits). A value that leaves its domain is walked on along its cycle until it is back
    inside. Sizes may differ by one from the largest, so that takes two tries on average, and four at worst.
    """
    bits = max(1, (int(sizes.max()) - 1).bit_length())
    out = _feistel(values.astype(np.uint64), bits, keys)
    limits = np.broadcast_to(sizes.astype(np.uint64), out.shape)
    while (outside := out >= limits).any():
        out = np.where(outside, _feistel(out, bits, keys), out)
    return out.astype(np.int64)


def _unpermute(value: int, size: int, keys: np.ndarray) -> int:
    """The place from which :func:`_permute` brings ``value``."""
    bits = max(1, (size - 1).bit_length())
    while True:
        value = _feistel_back(value, bits, [int(key) for key in keys])
        if value < size:
            return value


def _halves(bits: int) -> tuple[int, int]:
    """Bits of the right and of the left half. They may be unequal, for the rounds alternate which one is changed."""
    return bits // 2, bits - bits // 2


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits), uint64. ``keys`` [rounds, ...] broadcast against ``values``."""
    low, high = _halves(bits)
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    left_mask, right_mask = np.uint64((1 << high) - 1), np.uint64((1 << low) - 1)
    for number, key in enumerate(keys):
        if number % 2:
            right = right ^ (_splitmix(left ^ key) & right_mask)
        else:
            left = left ^ (_splitmix(right ^ key) & left_mask)
    return (left << np.uint64(low)) | right


def _feistel_back(value: int, bits: int, keys: list[int]) -> int:
    """The inverse of :func:`_feistel` for one value."""
    low, high = _halves(bits)
    left, right = value >> low, value & ((1 << low) - 1)
    for number in reversed(range(len(keys))):
        if number % 2:
            right ^= _hash(left ^ keys[number]) & ((1 << low) - 1)
        else:
            left ^= _hash(right ^ keys[number]) & ((1 << high) - 1)
    return (left << low) | right


def _hash(word: int) -> int:
    return int(_splitmix(np.asarray([word], dtype=np.uint64))[0])


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood, 2014), elementwise on uint64 with wrap-around."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
