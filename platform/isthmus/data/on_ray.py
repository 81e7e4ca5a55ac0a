"""A rank's rows through Ray Data: read, decoded and encoded by tasks and actors beside the trainer, in order.

An image can end the process that decodes it: a fault in a decoder, memory that runs out. Ray would try such a task
again for ever. Here it is tried a few times; then the rows in question are decoded one by one, each in a process of its
own. Those that end it each time are failures from then on, like any unreadable sample, and the pipeline goes on.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from isthmus.contracts import Sample
from isthmus.data.local import LocalRows, Plan, RawRows, Row, spans_of
from isthmus.data.pixels import BatchMemory
from isthmus.data.streamed import Encoding, StepEncoder
from isthmus.errors import DataError, IsthmusError

_WINDOW = 1024
"""Steps of one Ray Data pipeline, about."""

_READ_CPUS = 0.25

_DECODE_CPUS = 0.5
"""Logical CPUs of a reading and of a decoding task: little, so that trainers and their readers fit on a small machine
together."""

_TRIES = 2
"""How often a decoding task is begun before what it decodes is suspected, and each suspected row before it is given up.
The first time may have been the node's fault."""

_STANDSTILLS = 3
"""Pipelines that may die in a row without a step delivered or a deadly row found."""


def rows_on_ray(
    plan: Plan, steps: range, workers: int, prefetch: int, encoding: Encoding | None
) -> Iterator[LocalRows]:
    """The rows of ``steps``, in order, from a Ray Data pipeline.

    Args:
        workers: decoding tasks at once.
        prefetch: steps that the trainer's side holds ready.
        encoding: what encodes the images, by actors; None leaves pixels.

    Raises:
        DataError: tasks die again and again, and no row is to blame; and what :meth:`Plan.read` raises.
    """
    first, standstills = steps.start, 0
    while first < steps.stop:
        spans = list(islice(spans_of(plan.order, range(first, steps.stop)), max(1, _WINDOW // plan.order.span)))
        try:
            for local in _pipeline(plan, spans, workers, prefetch, encoding):
                first, standstills = local.step + 1, 0
                yield local
        except _crashes() as error:
            found = _deadly_rows(plan, range(first, spans[-1].stop))
            plan = replace(plan, deadly=plan.deadly | found)
            standstills = 0 if found else standstills + 1
            if standstills >= _STANDSTILLS:
                where = ", ".join(url for url, _ in plan.data)
                raise DataError(
                    f"The tasks that read {where} for step {first} died {standstills} times, and every image of "
                    f"that step can be decoded: {type(error).__name__}.",
                    "Look at the nodes' memory and at Ray's logs; the same command goes on from the last checkpoint.",
                ) from error


def _crashes() -> tuple[type[Exception], ...]:
    """What is raised when a process or a node dies under a task, as opposed to an error of our own code."""
    from ray import exceptions

    return (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError)


def _deadly_rows(plan: Plan, steps: range) -> frozenset[int]:
    """Manifest rows of the first step in ``steps`` that has some whose decoding ends its process; none otherwise."""
    for span in spans_of(plan.order, steps):
        for raw in plan.read(span):
            if not _dies(plan, raw, tries=1):
                continue
            numbers = plan.order.local(raw.step, plan.rank, plan.world).tolist()
            alone = [tuple(row if i == n else None for i, row in enumerate(raw.rows)) for n in range(len(raw.rows))]
            found = frozenset(
                number
                for number, rows in zip(numbers, alone, strict=True)
                if any(row is not None for row in rows) and _dies(plan, replace(raw, rows=rows), tries=_TRIES)
            )
            if found:
                return found
    return frozenset()


def _dies(plan: Plan, raw: RawRows, tries: int) -> bool:
    """Whether decoding ends the process that does it, each of ``tries`` times."""
    import ray

    def decode() -> None:
        plan.decode(raw)

    task = ray.remote(decode).options(num_cpus=_DECODE_CPUS, max_retries=tries - 1)
    try:
        ray.get(task.remote())
    except _crashes():
        return True
    return False


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
    dataset = dataset.map(
        decode,
        num_cpus=_DECODE_CPUS,
        concurrency=workers,
        ray_remote_args_fn=lambda: {"max_retries": _TRIES - 1},  # Ray Data's own default is without end
    )
    if encoding is not None:
        dataset = dataset.map(
            _EncodeRow,  # type: ignore[arg-type]  # an actor class, which Ray takes as well
            fn_constructor_args=(encoding, plan),
            compute=ray.data.ActorPoolStrategy(size=encoding.actors),
            num_cpus=encoding.cpus,
            num_gpus=encoding.gpus,
            resources=dict(encoding.resources),
        )
    memory = BatchMemory(2 * prefetch + 2)
    expected = iter(range(spans[0].start, spans[-1].stop))
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch):
        for number in range(len(block["step"])):
            local = _unpacked({name: column[number] for name, column in block.items()})
            if local.step != next(expected, None):
                raise DataError(f"Ray Data delivered step {local.step} out of order.", "Report this as a fault.")
            yield local if local.encoder else plan.finish(local, memory)


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
    heads = [_head(row) if isinstance(row, Sample) else row for row in local.rows]
    return _row(
        local.step, np.stack(arrays) if arrays else np.zeros(0, np.float32), (heads, local.encoder, local.retries)
    )


def _head(row: Sample) -> dict[str, Any]:
    """All of a sample but its pixels or features; a sound's patches are few beside those."""
    sound = {} if row.audio_NF is None else {"audio_NF": row.audio_NF, "audio_mask_N": row.audio_mask_N}
    return {"id": row.id, "key": row.key, "captions": row.captions, **sound}


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
    rows: list[Row] = [Sample(**head, **{name: next(arrays)}) if isinstance(head, dict) else head for head in heads]
    return LocalRows(int(row["step"]), tuple(rows), encoder, again)
