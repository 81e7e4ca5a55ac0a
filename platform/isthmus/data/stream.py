"""From an indexed data set to batches: Ray Data where Ray runs, threads elsewhere, the same batches either way.

What a rank sees at a step is a function of (data, order, rank, world, seed, step) alone. A resumed run therefore starts
at its step; nothing is replayed and no iterator state is saved.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from isthmus.config import DataConfig
from isthmus.contracts import Batch, Collate, Sample, Stage
from isthmus.data.local import LocalRows, Plan, Row, failures, to_batch, to_sample
from isthmus.data.manifest import Manifest
from isthmus.data.order import PADDING, Order
from isthmus.data.parallel import ray_is_up, store_environment
from isthmus.data.prefetch import ahead, map_ahead
from isthmus.data.quarantine import FailureBudget
from isthmus.data.readers import Failure, failure_of, read_rows
from isthmus.errors import DataError, IsthmusError

if TYPE_CHECKING:
    from isthmus.data.features import FeatureCache

log = logging.getLogger(__name__)

_WINDOW = 1024
"""Steps of one Ray Data pipeline. Each step is one task, so that the tasks under way are the next steps."""

_DECODE_CPUS = 0.5
"""Logical CPUs of a decoding task: little, so that trainers and their readers fit on a small machine together."""


def train_batches(
    data: DataConfig,
    stage: Stage,
    order: Order,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
    seed: int,
    on_failure: Callable[[Failure], None],
) -> Iterator[Batch]:
    """This rank's batches of steps ``start_step`` to ``stop_step`` - 1, each of exactly G/world rows.

    Placements ``inline`` and ``streamed`` read, decode and augment images (as Ray Data tasks when Ray is initialised);
    ``cached`` gathers features from a memory-mapped cache. Rows that are padding or could not be read repeat another
    row and are False in ``valid_B``.

    Args:
        on_failure: called once for every unreadable row, in order, before its batch is yielded.

    Raises:
        DataError: the data has changed, has no captions, does not fit the cache, or too many samples are unreadable.
    """
    manifest = Manifest.load(data.train)
    if len(manifest) != order.samples:
        raise DataError(
            f"{data.train} holds {len(manifest)} samples, the run's order was drawn over {order.samples}.",
            "The data has changed since the run began: start a new run.",
        )
    if manifest.captioned < len(manifest):
        raise DataError(
            f"{len(manifest) - manifest.captioned} of the {len(manifest)} samples of {data.train} have no caption.",
            "Training needs one for each: index the folder with captions required.",
        )
    steps = range(start_step, stop_step)
    if data.placement == "cached":
        source, blank = _cached_rows(data, stage, manifest, order, rank, world, steps)
    else:
        source, blank = _image_rows(data, stage, manifest, order, rank, world, steps, seed)
    if stage.needs_image_ids:
        _check_images(manifest, rank)
        source = _with_images(source, manifest, order, rank, world)
    return _batches(source, data, stage, order, blank, on_failure)


def _check_images(manifest: Manifest, rank: int) -> None:
    """Whether the data can say which rows are of one image."""
    if not manifest.names_images:
        raise DataError(
            f"The recipe makes rows of one image positives of one another (itc_same_image), and {manifest.root} was "
            "indexed before the index named images.",
            f"Run `isthmus data index {manifest.root}` again; its digest stays, and so do feature caches of it.",
        )
    if rank == 0 and len(np.unique(manifest.image_ids)) == len(manifest):
        log.warning(
            "itc_same_image has no effect on %s: no two of its samples have the same 'image_id' (a field of the JSON "
            "member, a Parquet column).",
            manifest.root,
        )


def _with_images(
    source: Iterable[LocalRows], manifest: Manifest, order: Order, rank: int, world: int
) -> Iterator[LocalRows]:
    """The same rows with the ids of their images, wherever they were read."""
    for local in source:
        numbers = order.local(local.step, rank, world)
        yield LocalRows(
            local.step,
            tuple(
                replace(row, image_id=int(manifest.image_ids[number])) if isinstance(row, Sample) else row
                for number, row in zip(numbers, local.rows, strict=True)
            ),
        )


def _batches(
    source: Iterable[LocalRows],
    data: DataConfig,
    stage: Stage,
    order: Order,
    blank: Sample,
    on_failure: Callable[[Failure], None],
) -> Iterator[Batch]:
    budget = FailureBudget(order.samples, data.max_failed_share, data.train)
    collate = stage.collate if data.captions == "drawn" else _OnFirstCaptions(stage.collate)
    made = ((local, to_batch(local, order, collate, blank)) for local in source)
    for local, batch in ahead(made, data.prefetch):
        failed = failures(local.rows)
        for failure in failed:
            on_failure(failure)
        budget.count(sum(row is not None for row in local.rows), failed)
        yield batch


class _OnFirstCaptions:
    """A collate function that sees each sample with its first caption alone."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        return self.collate([replace(sample, captions=sample.captions[:1]) for sample in samples], epoch, step)


def _image_rows(
    data: DataConfig, stage: Stage, manifest: Manifest, order: Order, rank: int, world: int, steps: range, seed: int
) -> tuple[Iterable[LocalRows], Sample]:
    size = int(stage.image_spec["image_size"])
    plan = Plan(
        data.train, manifest.digest, order, rank, world, seed, stage.augment, size, environment=store_environment()
    )
    blank = Sample(-1, "", ("",), pixels_CHW=np.zeros((3, size, size), np.float32))
    if ray_is_up():
        return _on_ray(plan, steps, data.decode_workers, data.prefetch), blank
    return map_ahead(plan, steps, data.decode_workers, data.prefetch), blank


# ---------------------------------------------------------------------------------------------------- Ray Data


def _on_ray(plan: Plan, steps: range, workers: int, prefetch: int) -> Iterator[LocalRows]:
    for first in range(steps.start, steps.stop, _WINDOW):
        yield from _pipeline(plan, range(first, min(first + _WINDOW, steps.stop)), workers, prefetch)


def _pipeline(plan: Plan, steps: range, workers: int, prefetch: int) -> Iterator[LocalRows]:
    """A Ray Data pipeline over ``steps``: one row, block and task for each, delivered in order."""
    import ray.data

    def make(row: dict[str, Any]) -> dict[str, Any]:
        step = int(row["step"])
        try:
            return _packed(plan(step))
        except IsthmusError as error:  # carried as a value: Ray's own wrapping keeps only its text
            return _row(step, np.zeros(0, np.float32), error)

    # The steps are blocks that are there already. A range would be read by tasks of one whole CPU each, which a machine
    # whose CPUs are all trainers' never has.
    dataset: ray.data.Dataset = ray.data.from_arrow([pa.table({"step": [step]}) for step in steps])
    dataset.context.execution_options.preserve_order = True  # this pipeline's own context, not the process's
    dataset = dataset.map(make, num_cpus=_DECODE_CPUS, concurrency=workers)
    expected = iter(steps)
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch):
        for number in range(len(block["step"])):
            local = _unpacked({name: column[number] for name, column in block.items()})
            if local.step != next(expected, None):
                raise DataError(f"Ray Data delivered step {local.step} out of order.", "Report this as a fault.")
            yield local


def _packed(local: LocalRows) -> dict[str, Any]:
    """Pixels as one tensor, everything else pickled: what Ray moves through shared memory."""
    pixels = [np.asarray(row.pixels_CHW) for row in local.rows if isinstance(row, Sample)]
    heads = [(row.id, row.key, row.captions) if isinstance(row, Sample) else row for row in local.rows]
    return _row(local.step, np.stack(pixels) if pixels else np.zeros(0, np.float32), heads)


def _row(step: int, pixels: np.ndarray, rest: Any) -> dict[str, Any]:
    shape = np.asarray(pixels.shape, np.int64)
    return {"step": step, "shape": shape, "pixels": pixels.reshape(-1), "rest": pickle.dumps(rest)}


def _unpacked(row: dict[str, Any]) -> LocalRows:
    rest = pickle.loads(row["rest"])  # noqa: S301  (written by our own task)
    if isinstance(rest, IsthmusError):
        raise rest
    pixels = iter(np.asarray(row["pixels"], np.float32).reshape(tuple(row["shape"])))
    rows: list[Row] = []
    for head in rest:
        rows.append(Sample(head[0], head[1], head[2], next(pixels)) if isinstance(head, tuple) else head)
    return LocalRows(int(row["step"]), tuple(rows))


# ------------------------------------------------------------------------------------------------------ cached


def _cached_rows(
    data: DataConfig, stage: Stage, manifest: Manifest, order: Order, rank: int, world: int, steps: range
) -> tuple[Iterable[LocalRows], Sample]:
    from isthmus.data.features import FeatureCache

    assert data.cache is not None  # the configuration's own rule
    encoders = [base.digest for base in stage.bases if base.role == "vision"]
    expect = {"manifest_digest": manifest.digest, **({"encoder_digest": encoders[0]} if encoders else {})}
    cache = FeatureCache.open(data.cache, expect=expect)
    shape = (cache.meta.tokens, cache.meta.width)
    blank = Sample(-1, "", ("",), features_ND=np.zeros(shape, cache.meta.dtype))

    def rows() -> Iterator[LocalRows]:
        for step in steps:
            numbers = order.local(step, rank, world)
            yield LocalRows(
                step, tuple(_from_cache(cache, manifest, int(n)) if n != PADDING else None for n in numbers)
            )

    return rows(), blank


def _from_cache(cache: FeatureCache, manifest: Manifest, row: int) -> Sample | Failure:
    sample = cache.get(int(manifest.ids[row]))
    return sample if sample is not None else failure_of(manifest, row, "the image was unreadable when it was encoded")


# --------------------------------------------------------------------------------------------------- in order


def iter_samples(
    manifest: Manifest,
    *,
    transform: Callable[[Any], np.ndarray] | None = None,
    cache: FeatureCache | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    batch: int = 64,
    threads: int = 2,
) -> Iterator[list[Sample | Failure]]:
    """Samples in manifest order for inference and evaluation, ``batch`` at a time, read ahead by threads.

    Args:
        transform: makes ``pixels_CHW``; without it (and without a cache) only captions are read.
        cache: gives ``features_ND`` instead of pixels, for the rows it holds; others are failures.
        rows: manifest row numbers, in the order wanted; all of them by default.
    """
    wanted = iter(range(len(manifest)) if rows is None else (int(row) for row in rows))
    size = getattr(transform, "size", None)

    def load(group: list[int]) -> list[Sample | Failure]:
        if cache is not None:
            return [_from_cache(cache, manifest, row) for row in group]
        return [
            to_sample(manifest, row, raw, transform, size)
            for row, raw in zip(group, read_rows(manifest, group), strict=True)
        ]

    groups = iter(lambda: list(islice(wanted, batch)), [])
    yield from map_ahead(load, groups, threads, depth=1)
