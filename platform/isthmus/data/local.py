"""One rank's rows of one step, as a function of the step: the same in a thread, in a Ray task, and after a resume."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from isthmus.contracts import Batch, Collate, Sample
from isthmus.data.clips import ClipTransform
from isthmus.data.manifest import Manifest
from isthmus.data.order import PADDING, SampleOrder, mix
from isthmus.data.pixels import BatchMemory, TrainingPixels
from isthmus.data.ranges import retries
from isthmus.data.readers import Failure, RawSample, failure_of
from isthmus.data.sets import Named, Sets
from isthmus.data.transforms import DecodeError, decode_image
from isthmus.errors import DataError

READ_BYTES = 256 << 20
"""Encoded images that one read holds, about; a step's own rows are held in any case."""

Row = Sample | Failure | None
"""A row of a local batch; None is the padding at an epoch's end."""


@dataclass(frozen=True)
class LocalRows:
    """The rows of one rank at one step, [G/world] of them.

    Attributes:
        encoder: digest of what encoded them already.
        retries: reads that had to be tried again on the way to these rows.
    """

    step: int
    rows: tuple[Row, ...]
    encoder: str = ""
    retries: int = 0


@dataclass(frozen=True)
class RawRows:
    """The same rows as stored, before any image is decoded."""

    step: int
    rows: tuple[RawSample | Failure | None, ...]
    retries: int = 0


@dataclass(frozen=True)
class Plan:
    """What decides the rows of a rank. Picklable; the manifests are loaded once in each process that needs them.

    Attributes:
        data: URLs of the indexed folders and the digests that their manifests must have.
        order, rank, world: whose rows.
        seed: of the augmentation.
        augment: (PIL image, seed) -> float32 [3, H, W], or uint8 [H, W, 3] where ``pixels`` is given; or a
            :class:`ClipTransform`, which takes a whole sample.
        size: pixels that :func:`decode_image` has to leave (``at_least``).
        environment: variables to lay over the process's own.
        deadly: manifest rows that are not decoded, since that ends the process.
        pixels: finishes what ``augment`` gives; None where that is float already.
    """

    data: Named
    order: SampleOrder
    rank: int
    world: int
    seed: int
    augment: Callable[[Any, int], np.ndarray] | ClipTransform
    size: int
    environment: Mapping[str, str] = field(default_factory=dict)
    deadly: frozenset[int] = frozenset()
    pixels: TrainingPixels | None = None

    def __call__(self, step: int) -> LocalRows:
        """Read, decode, augment and normalise the rows of ``step``."""
        return self.finish(self.decode(next(self.read(range(step, step + 1)))))

    def sets(self) -> Sets:
        """The data, opened in whichever process this runs: reading and decoding are tasks of their own."""
        os.environ.update(self.environment)
        return opened(self.data)

    def read(self, steps: range) -> Iterator[RawRows]:
        """The stored rows of ``steps``, step by step. They are fetched together, as far as memory allows, and in the
        order in which they lie in the shards: the rows of a span of :class:`Order` are neighbours there."""
        sets = self.sets()
        numbers_SB = np.stack([self.order.local(step, self.rank, self.world) for step in steps])
        sounds = isinstance(self.augment, ClipTransform)
        sizes_S = sets.image_bytes(numbers_SB, sounds=sounds).sum(1)
        together_S = np.cumsum(sizes_S) // READ_BYTES
        for group in np.unique(together_S):
            some = np.flatnonzero(together_S == group)
            numbers = numbers_SB[some]
            wanted, times = np.unique(numbers[numbers != PADDING], return_counts=True)
            before = int(retries)
            found = _Shelf(wanted, sets.read(wanted, sounds=sounds), times)
            again = int(retries) - before
            for step, row in zip(some.tolist(), numbers.tolist(), strict=True):
                yield RawRows(steps[step], tuple(found.take(n) if n != PADDING else None for n in row), again)
                again = 0

    def decode(self, raw: RawRows) -> LocalRows:
        """What was read, decoded and augmented."""
        sets, place = self.sets(), (raw.step, self.rank, self.world)
        numbers, visits = self.order.local(*place).tolist(), self.order.visits(*place).tolist()
        rows: list[Row] = []
        for number, visit, stored in zip(numbers, visits, raw.rows, strict=True):
            if stored is None:
                rows.append(None)
            elif number in self.deadly:
                data = b"" if isinstance(stored, Failure) else stored.image
                rows.append(failure_of(*sets.place(number), "decoding it ended the process that did it", data))
            else:
                seed = mix(self.seed, sets.unique_id(number, stored.id), visit)
                rows.append(to_sample(*sets.place(number), stored, _Seeded(self.augment, seed), self.size))
        return LocalRows(raw.step, tuple(rows), retries=raw.retries)

    def finish(self, local: LocalRows, memory: BatchMemory | None = None) -> LocalRows:
        """What was decoded, with the pixels that the model takes: float32 [3, H, W], rows of one array, in ``memory``
        where that is given."""
        if self.pixels is None:
            return local
        uint8 = [row.pixels_CHW for row in local.rows if isinstance(row, Sample)]
        finished = iter(self.pixels.finish(uint8, memory))
        rows = (replace(row, pixels_CHW=next(finished)) if isinstance(row, Sample) else row for row in local.rows)
        return replace(local, rows=tuple(rows))


def spans_of(order: SampleOrder, steps: range) -> Iterator[range]:
    """``steps`` cut where the order's spans end: what is best read together."""
    first = steps.start
    while first < steps.stop:
        stop = min(order.span_end(first), steps.stop)
        yield range(first, stop)
        first = stop


class _Shelf:
    """What was read together, each row kept until it has been taken as often as it is needed."""

    def __init__(self, wanted: np.ndarray, found: Iterable[RawSample | Failure], times: np.ndarray) -> None:
        self._rows = dict(zip(wanted.tolist(), found, strict=True))
        self._left = dict(zip(wanted.tolist(), times.tolist(), strict=True))

    def take(self, number: int) -> RawSample | Failure:
        self._left[number] -= 1
        return self._rows[number] if self._left[number] else self._rows.pop(number)


@dataclass(frozen=True)
class Unaugmented:
    """The plain transform in the place of an augmentation."""

    transform: Callable[[Any], np.ndarray]

    def __call__(self, image: Any, _seed: int) -> np.ndarray:
        return self.transform(image)


@dataclass(frozen=True)
class _Seeded:
    """An augmentation with its seed."""

    augment: Callable[[Any, int], np.ndarray] | ClipTransform
    seed: int


def to_sample(
    manifest: Manifest,
    row: int,
    raw: RawSample | Failure,
    transform: Callable[[Any], np.ndarray] | ClipTransform | _Seeded | None,
    size: int | None,
) -> Sample | Failure:
    """A stored sample decoded and transformed, or why that failed. ``transform`` None leaves the image alone."""
    if isinstance(raw, Failure):
        return raw
    if transform is None:
        return Sample(raw.id, raw.key, raw.captions)
    make, *seed = (transform.augment, transform.seed) if isinstance(transform, _Seeded) else (transform,)
    try:
        if isinstance(make, ClipTransform):
            return Sample(raw.id, raw.key, raw.captions, **make.arrays(raw, *seed))
        pixels_CHW = make(decode_image(raw.image, at_least=size), *seed)
        return Sample(raw.id, raw.key, raw.captions, pixels_CHW=pixels_CHW)
    except DecodeError as error:
        return failure_of(manifest, row, error.reason, raw.image)


@functools.lru_cache(maxsize=4)
def cached_manifest(url: str, digest: str) -> Manifest:
    """The manifest of ``url``, loaded once per process.

    Raises:
        DataError: the folder was indexed anew since ``digest`` was read.
    """
    manifest = Manifest.load(url, verify=False)
    if manifest.digest != digest:
        raise DataError(f"{url} was indexed anew while a run reads it.", "Start the run again.")
    return manifest


@functools.lru_cache(maxsize=4)
def opened(data: Named) -> Sets:
    """The data sets of a run, loaded once per process. Raises as :func:`cached_manifest`."""
    return Sets(tuple(cached_manifest(url, digest) for url, digest in data))


def to_batch(local: LocalRows, order: SampleOrder, collate: Collate, blank: Sample) -> Batch:
    """The batch of a rank, always of all its rows.

    Padding and failed rows repeat a sample of the batch (``blank`` where there is none) and are False in ``valid_B``.
    """
    good = [row for row in local.rows if isinstance(row, Sample)] or [blank]
    filled = [row if isinstance(row, Sample) else good[number % len(good)] for number, row in enumerate(local.rows)]
    valid_B = torch.tensor([isinstance(row, Sample) for row in local.rows], dtype=torch.bool)
    batch = collate(filled, order.epoch_of(local.step), local.step)
    return replace(batch, valid_B=batch.valid_B & valid_B)


def failures(rows: Sequence[Row]) -> list[Failure]:
    """The failed ones."""
    return [row for row in rows if isinstance(row, Failure)]
