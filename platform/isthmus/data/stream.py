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
from isthmus.data.local import LocalRows, Plan, Row, Unaugmented, failures, to_batch, to_sample
from isthmus.data.manifest import Manifest
from isthmus.data.order import PADDING, Order
from isthmus.data.parallel import ray_is_up, store_environment
from isthmus.data.pixels import training_pixels
from isthmus.data.prefetch import ahead, map_ahead
from isthmus.data.quarantine import FailureBudget
from isthmus.data.readers import Failure, failure_of, read_rows
from isthmus.data.streamed import Encoding, StepEncoder
from isthmus.errors import DataError, IsthmusError

if TYPE_CHECKING:
    from isthmus.data.features import FeatureCache

log = logging.getLogger(__name__)

_WINDOW = 1024
"""Steps of one Ray Data pipeline, about."""

_READ_CPUS = 0.25

_DECODE_CPUS = 0.5
"""Logical CPUs of a reading and of a decoding task: little, so that trainers and their readers fit on a small machine
together."""


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
    encoding: Encoding | None = None,
    on_encoder: Callable[[str], None] | None = None,
    on_retries: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """This rank's batches of steps ``start_step`` to ``stop_step`` - 1, each of exactly G/world rows.

    Placements ``inline`` and ``streamed`` read, decode and augment images (as Ray Data tasks when Ray is initialised);
    ``streamed`` also encodes them there. ``cached`` gathers features from a memory-mapped cache. Rows that are padding
    or could not be read repeat another row and are False in ``valid_B``.

    Args:
        on_failure: called once for every unreadable row, in order, before its batch is yielded.
        encoding: what encodes the images; needed by ``streamed`` alone.
        on_encoder: called with the digest of the encoder that the first encoded batch came from.
        on_retries: called with the number of reads that had to be tried again, where there were any.

    Raises:
        DataError: the data has changed, has no captions, does not fit the cache, too many samples are unreadable, or
            two encoders have different weights.
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
        streamed = encoding if data.placement == "streamed" else None
        source, blank = _image_rows(data, stage, manifest, order, rank, world, steps, seed, streamed)
        source = _of_one_encoder(source, on_encoder)
    if stage.needs_image_ids:
        _check_images(manifest, rank)
        source = _with_images(source, manifest, order, rank, world)
    return _batches(source, data, stage, order, blank, on_failure, on_retries)


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
        rows = tuple(
            replace(row, image_id=int(manifest.image_ids[number])) if isinstance(row, Sample) else row
            for number, row in zip(numbers, local.rows, strict=True)
        )
        yield replace(local, rows=rows)


def _of_one_encoder(source: Iterable[LocalRows], on_encoder: Callable[[str], None] | None) -> Iterator[LocalRows]:
    """The same rows, which one encoder made if any did."""
    known = ""
    for local in source:
        if local.encoder and not known:
            known = local.encoder
            if on_encoder:
                on_encoder(known)
        if local.encoder != known:
            raise DataError(
                f"Two encoders of this run have different weights ({known[:12]}, {local.encoder[:12]}).",
                "A local file named in method.vision.weights must be the same on every node.",
            )
        yield local


def _batches(
    source: Iterable[LocalRows],
    data: DataConfig,
    stage: Stage,
    order: Order,
    blank: Sample,
    on_failure: Callable[[Failure], None],
    on_retries: Callable[[int], None] | None,
) -> Iterator[Batch]:
    budget = FailureBudget(order.samples, data.max_failed_share, data.train)
    collate = stage.collate if data.captions == "drawn" else _OnFirstCaptions(stage.collate)
    made = ((local, to_batch(local, order, collate, blank)) for local in source)
    for local, batch in ahead(made, data.prefetch):
        failed = failures(local.rows)
        for failure in failed:
            on_failure(failure)
        budget.count(sum(row is not None for row in local.rows), failed)
        if local.retries and on_retries:
            on_retries(local.retries)
        yield batch


class _OnFirstCaptions:
    """A collate function that sees each sample with its first caption alone."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        return self.collate([replace(sample, captions=sample.captions[:1]) for sample in samples], epoch, step)


def _image_rows(
    data: DataConfig,
    stage: Stage,
    manifest: Manifest,
    order: Order,
    rank: int,
    world: int,
    steps: range,
    seed: int,
    encoding: Encoding | None,
) -> tuple[Iterable[LocalRows], Sample]:
    size = int(stage.image_spec["image_size"])
    pixels = training_pixels(stage, data)
    augment = pixels or (stage.augment if data.augment else Unaugmented(stage.transform))
    plan = Plan(
        data.train, manifest.digest, order, rank, world, seed, augment, size,
        environment=store_environment(), pixels=pixels,
    )  # fmt: skip
    blank = Sample(-1, "", ("",), pixels_CHW=np.zeros((3, size, size), np.float32))
    if encoding is not None:
        shape = (int(stage.image_spec["tokens"]), int(stage.image_spec["width"]))
        blank = Sample(-1, "", ("",), features_ND=np.zeros(shape, np.float32))
    if ray_is_up():
        return _on_ray(plan, steps, data.decode_workers, data.prefetch, encoding), blank
    return _on_threads(plan, steps, data.decode_workers, data.prefetch, encoding), blank


def _spans(order: Order, steps: range) -> Iterator[range]:
    """``steps`` cut where the order's spans end: what is best read together."""
    first = steps.start
    while first < steps.stop:
        stop = min(order.span_end(first), steps.stop)
        yield range(first, stop)
        first = stop


def _on_threads(
    plan: Plan, steps: range, workers: int, prefetch: int, encoding: Encoding | None
) -> Iterator[LocalRows]:
    raw = (rows for span in _spans(plan.order, steps) for rows in plan.read(span))
    decoded = map_ahead(lambda rows: plan.finish(plan.decode(rows)), ahead(raw, prefetch), workers, prefetch)
    return decoded if encoding is None else map(StepEncoder(encoding), decoded)


# ---------------------------------------------------------------------------------------------------- Ray Data


def _on_ray(plan: Plan, steps: range, workers: int, prefetch: int, encoding: Encoding | None) -> Iterator[LocalRows]:
    spans = _spans(plan.order, steps)
    while window := list(islice(spans, max(1, _WINDOW // plan.order.span))):
        yield from _pipeline(plan, window, workers, prefetch, encoding)


def _pipeline(
    plan: Plan, spans: Sequence[range], workers: int, prefetch: int, encoding: Encoding | None
) -> Iterator[LocalRows]:
    """A Ray Data pipeline: a task for each span reads it and hands its steps on one by one, a task for each step
    decodes it, and actors encode it if asked; delivered in order, read no further ahead than Ray's back-pressure lets
    it."""
    import ray.data

    def read(block: pa.Table) -> Iterator[pa.Table]:
        span = range(block["first"][0].as_py(), block["stop"][0].as_py())
        try:
            for raw in plan.read(span):
                yield _stored(raw.step, raw)
        except IsthmusError as error:  # carried as a value: Ray's own wrapping keeps only its text
            yield _stored(span.start, error)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        raw = pickle.loads(row["rest"])  # noqa: S301  (written by our own task)
        try:
            if isinstance(raw, IsthmusError):
                raise raw
            return _packed(plan.decode(raw))
        except IsthmusError as error:
            return _row(int(row["step"]), np.zeros(0, np.float32), error)

    # The spans are blocks that are there already. A range would be read by tasks of one whole CPU each, which a machine
    # whose CPUs are all trainers' never has.
    blocks = [pa.table({"first": [span.start], "stop": [span.stop]}) for span in spans]
    dataset: ray.data.Dataset = ray.data.from_arrow(blocks)
    dataset.context.execution_options.preserve_order = True  # this pipeline's own context, not the process's
    dataset.context.target_max_block_size = 1  # a block a step, whatever its size
    # Other resources than decoding has, or Ray would run both in one task, and a span's images one after the other.
    dataset = dataset.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=_READ_CPUS, concurrency=1)
    dataset = dataset.map(decode, num_cpus=_DECODE_CPUS, concurrency=workers)
    if encoding is not None:
        dataset = dataset.map(
            _EncodeRow,  # type: ignore[arg-type]  # an actor class, which Ray takes as well
            fn_constructor_args=(encoding, plan),
            compute=ray.data.ActorPoolStrategy(size=encoding.actors),
            num_cpus=encoding.cpus,
            num_gpus=encoding.gpus,
            resources=dict(encoding.resources),
        )
    expected = iter(range(spans[0].start, spans[-1].stop))
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch):
        for number in range(len(block["step"])):
            local = _unpacked({name: column[number] for name, column in block.items()})
            if local.step != next(expected, None):
                raise DataError(f"Ray Data delivered step {local.step} out of order.", "Report this as a fault.")
            yield local if local.encoder else plan.finish(local)


def _stored(step: int, rest: Any) -> pa.Table:
    return pa.table({"step": [step], "rest": pa.array([pickle.dumps(rest)], pa.large_binary())})


class _EncodeRow:
    """A Ray Data actor around :class:`StepEncoder`."""

    def __init__(self, encoding: Encoding, plan: Plan) -> None:
        self._encode, self._plan = StepEncoder(encoding, alone=True), plan

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return _packed(self._encode(self._plan.finish(_unpacked(row))))
        except IsthmusError as error:
            return _row(int(row["step"]), np.zeros(0, np.float32), error)


def _packed(local: LocalRows) -> dict[str, Any]:
    """Pixels or features as one tensor, everything else pickled: what Ray moves through shared memory."""
    good = [row for row in local.rows if isinstance(row, Sample)]
    arrays = [np.asarray(row.features_ND if local.encoder else row.pixels_CHW) for row in good]
    heads = [(row.id, row.key, row.captions) if isinstance(row, Sample) else row for row in local.rows]
    return _row(
        local.step, np.stack(arrays) if arrays else np.zeros(0, np.float32), (heads, local.encoder, local.retries)
    )


def _row(step: int, array: np.ndarray, rest: Any) -> dict[str, Any]:
    shape = np.asarray(array.shape, np.int64)
    return {"step": step, "shape": shape, "array": array.reshape(-1), "rest": pickle.dumps(rest)}


def _unpacked(row: dict[str, Any]) -> LocalRows:
    rest = pickle.loads(row["rest"])  # noqa: S301  (written by our own task)
    if isinstance(rest, IsthmusError):
        raise rest
    heads, encoder, again = rest
    name = "features_ND" if encoder else "pixels_CHW"
    arrays = iter(np.asarray(row["array"]).reshape(tuple(row["shape"])))
    rows: list[Row] = [Sample(*head, **{name: next(arrays)}) if isinstance(head, tuple) else head for head in heads]
    return LocalRows(int(row["step"]), tuple(rows), encoder, again)


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
