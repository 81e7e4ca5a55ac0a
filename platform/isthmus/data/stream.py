"""From an indexed data set to batches: Ray Data where Ray runs, threads elsewhere, the same batches either way.

What a rank sees at a step is a function of (data, order, rank, world, seed, step) alone. A resumed run therefore starts
at its step; nothing is replayed and no iterator state is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.config import DataConfig
from isthmus.contracts import Batch, Collate, Sample, Stage
from isthmus.data.clips import ClipTransform, clip_transform
from isthmus.data.local import LocalRows, Plan, Row, Unaugmented, failures, spans_of, to_batch, to_sample
from isthmus.data.manifest import Manifest
from isthmus.data.mixture import warn_of_repeats
from isthmus.data.on_ray import rows_on_ray
from isthmus.data.order import SampleOrder
from isthmus.data.parallel import ray_is_up, store_environment
from isthmus.data.pixels import BatchMemory, drawing, training_pixels
from isthmus.data.prefetch import ahead, map_ahead
from isthmus.data.quarantine import FailureBudget
from isthmus.data.questions import with_questions
from isthmus.data.readers import Failure, failure_of, read_rows
from isthmus.data.sets import Sets
from isthmus.data.shuffled import CaptionsOf, stored_captions, with_others_captions
from isthmus.data.streamed import Encoding, StepEncoder
from isthmus.errors import DataError

if TYPE_CHECKING:
    from isthmus.data.features import FeatureCache

log = logging.getLogger(__name__)


def train_batches(
    data: DataConfig,
    stage: Stage,
    order: SampleOrder,
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
    sets = Sets(tuple(Manifest.load(one.url) for one in data.sets))
    heard = clip_transform(stage.transform)
    for manifest, samples in zip(sets.manifests, order.sizes, strict=True):
        _check_samples(manifest, samples, captions=heard is None and not stage.needs_questions)
    if rank == 0:
        warn_of_repeats(data, order)
    steps = range(start_step, stop_step)
    if data.placement == "cached":
        caches = _open_caches(data, stage, sets)
        source, blank = _cached_rows(caches, heard, sets, order, rank, world, steps)
        captions_of = _cached_captions(caches, sets)
    else:
        streamed = encoding if data.placement == "streamed" else None
        source, blank = _image_rows(data, stage, sets, order, rank, world, steps, seed, streamed)
        source = _of_one_encoder(source, on_encoder)
        captions_of = stored_captions(sets)
    if data.shuffled_pairs and heard is not None:
        raise DataError(
            "data.shuffled_pairs exchanges captions, and this recipe pairs sounds with what is seen.",
            "Leave it out; benchmarks/video_audio.py has the control for sounds.",
        )
    if data.shuffled_pairs and stage.needs_questions:
        raise DataError(
            "data.shuffled_pairs exchanges captions, and this recipe reads questions.",
            "Leave it out: the share of the commonest answer is what a control would reach.",
        )
    if data.shuffled_pairs:
        source = with_others_captions(source, order, rank, world, seed, captions_of)
    if stage.needs_image_ids:
        for manifest in sets.manifests:
            _check_images(manifest, rank)
    if stage.needs_questions:
        source = with_questions(source, sets, order, rank, world)
    if stage.needs_image_ids or sets.several:
        source = _as_met(source, sets, order, rank, world, stage.needs_image_ids)
    return _batches(source, data, stage, order, blank, on_failure, on_retries)


def _check_samples(manifest: Manifest, samples: int, *, captions: bool) -> None:
    """Whether the data is what the run's order was drawn over, and all of it has captions, where they are needed."""
    if len(manifest) != samples:
        raise DataError(
            f"{manifest.root} holds {len(manifest)} samples, the run's order was drawn over {samples}.",
            "The data has changed since the run began: start a new run.",
        )
    if captions and manifest.captioned < len(manifest):
        raise DataError(
            f"{len(manifest) - manifest.captioned} of the {len(manifest)} samples of {manifest.root} have no caption.",
            "Training needs one for each: index the folder with captions required.",
        )


def _check_images(manifest: Manifest, rank: int) -> None:
    """Whether the data can say which rows are of one image."""
    if not manifest.names_images:
        raise DataError(
            f"The recipe makes rows of one image positives of one another (itc_same_image), and {manifest.root} was "
            "indexed before the index named images.",
            f"Run `isthmus data index {manifest.root}` again; its digest stays, and so do feature caches of it.",
        )
    if rank == 0 and not manifest.repeats_images:
        log.warning(
            "itc_same_image has no effect on %s: no two of its samples have the same 'image_id' (a field of the JSON "
            "member, a Parquet column).",
            manifest.root,
        )


def _as_met(
    source: Iterable[LocalRows], sets: Sets, order: SampleOrder, rank: int, world: int, images: bool
) -> Iterator[LocalRows]:
    """The same rows as :meth:`Sets.as_met` has them, wherever they were read."""
    for local in source:
        place = (local.step, rank, world)
        rows = sets.as_met(local.rows, order.local(*place), order.visits(*place), images=images)
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
    order: SampleOrder,
    blank: Sample,
    on_failure: Callable[[Failure], None],
    on_retries: Callable[[int], None] | None,
) -> Iterator[Batch]:
    budget = FailureBudget(order.samples, data.max_failed_share, data.where)
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
    sets: Sets,
    order: SampleOrder,
    rank: int,
    world: int,
    steps: range,
    seed: int,
    encoding: Encoding | None,
) -> tuple[Iterable[LocalRows], Sample]:
    side = size = int(stage.image_spec["image_size"])
    pixels = training_pixels(stage, data)
    if pixels is not None and data.augment:
        side = pixels.transform.least_side
    augment: Any = pixels or (stage.augment if data.augment else Unaugmented(stage.transform))
    clips = clip_transform(stage.transform)
    if clips is not None:
        augment = replace(clips.augmenting, image=drawing(clips.image, data)) if data.augment else clips
    plan = Plan(sets.named, order, rank, world, seed, augment, side, environment=store_environment(), pixels=pixels)
    blank = _blank(clips, size)
    if encoding is not None:
        shape = (int(stage.image_spec["tokens"]), int(stage.image_spec["width"]))
        blank = replace(blank, pixels_CHW=None, features_ND=np.zeros(shape, np.float32))
    if ray_is_up():
        return rows_on_ray(plan, steps, data.decode_workers, data.prefetch, encoding), blank
    return _on_threads(plan, steps, data.decode_workers, data.prefetch, encoding), blank


def _blank(clips: ClipTransform | None, size: int) -> Sample:
    """What stands in a batch that has not one readable row."""
    if clips is None:
        return Sample(-1, "", ("",), pixels_CHW=np.zeros((3, size, size), np.float32))
    sound: dict[str, Any] = {
        "audio_NF": np.zeros(clips.sound_shape, np.float32),
        "audio_mask_N": np.ones(clips.sound_shape[0], bool),
    }
    return Sample(-1, "", ("",), pixels_CHW=np.zeros(clips.seen_shape, np.float32), **sound)


def _on_threads(
    plan: Plan, steps: range, workers: int, prefetch: int, encoding: Encoding | None
) -> Iterator[LocalRows]:
    raw = (rows for span in spans_of(plan.order, steps) for rows in plan.read(span))
    # As many as are under way: decoded, in line for the trainer, and with it.
    memory = BatchMemory(workers + 2 * prefetch + 2)
    decoded = map_ahead(lambda rows: plan.finish(plan.decode(rows), memory), ahead(raw, prefetch), workers, prefetch)
    return decoded if encoding is None else map(StepEncoder(encoding), decoded)


# ------------------------------------------------------------------------------------------------------ cached


def _cached_rows(
    caches: Sequence[FeatureCache],
    clips: ClipTransform | None,
    sets: Sets,
    order: SampleOrder,
    rank: int,
    world: int,
    steps: range,
) -> tuple[Iterable[LocalRows], Sample]:
    shape = (caches[0].meta.tokens, caches[0].meta.width)
    blank = _blank(clips, 0)
    blank = replace(blank, pixels_CHW=None, features_ND=np.zeros(shape, caches[0].meta.dtype))

    def rows() -> Iterator[LocalRows]:
        for step in steps:
            numbers = order.local(step, rank, world)
            found: list[Row] = [None] * len(numbers)
            for number, here, own in sets.by_set(numbers):
                samples = _from_cache(caches[number], sets.manifests[number], own.tolist())
                for place, sample in zip(np.flatnonzero(here).tolist(), samples, strict=True):
                    found[place] = sample
            yield LocalRows(step, tuple(found))

    return rows(), blank


def _cached_captions(caches: Sequence[FeatureCache], sets: Sets) -> CaptionsOf:
    def captions_of(numbers: np.ndarray) -> list[tuple[str, ...] | None]:
        found: list[tuple[str, ...] | None] = [None] * len(numbers)
        for number, here, own in sets.by_set(numbers):
            ids = sets.manifests[number].ids_of(own.tolist()).tolist()
            for place, id in zip(np.flatnonzero(here).tolist(), ids, strict=True):
                found[place] = caches[number].captions(id) if id in caches[number] else None
        return found

    return captions_of


def _open_caches(data: DataConfig, stage: Stage, sets: Sets) -> list[FeatureCache]:
    """The feature cache of each set. Their features go into one batch, so they must be of one encoder and kind."""
    from isthmus.data.features import EncodedBy, FeatureCache, check_alike

    digest = next((base.digest for base in stage.bases if base.role == "vision"), "")
    encoder = EncodedBy(digest, clips=clip_transform(stage.transform))  # its configuration is compared before the start
    caches: list[FeatureCache] = []
    for one, manifest in zip(data.sets, sets.manifests, strict=True):
        assert one.cache is not None  # the configuration's own rule
        caches.append(FeatureCache.of_model(one.cache, manifest, encoder))
    check_alike({cache.url: cache.meta for cache in caches})
    return caches


def _from_cache(cache: FeatureCache, manifest: Manifest, rows: Sequence[int]) -> list[Sample | Failure]:
    reason = "the image was unreadable when it was encoded"
    found = zip(rows, map(cache.get, manifest.ids_of(rows).tolist()), strict=True)
    return [failure_of(manifest, row, reason) if sample is None else sample for row, sample in found]


# --------------------------------------------------------------------------------------------------- in order


def iter_samples(
    manifest: Manifest,
    *,
    transform: Callable[[Any], np.ndarray] | ClipTransform | None = None,
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
    heard = clip_transform(transform) is not None

    def load(group: list[int]) -> list[Sample | Failure]:
        if cache is not None:
            return _from_cache(cache, manifest, group)
        return [
            to_sample(manifest, row, raw, transform, size)
            for row, raw in zip(group, read_rows(manifest, group, sounds=heard), strict=True)
        ]

    groups = iter(lambda: list(islice(wanted, batch)), [])
    yield from map_ahead(load, groups, threads, depth=1)
