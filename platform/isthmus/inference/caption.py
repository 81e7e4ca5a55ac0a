"""Bulk captioning of an image lake: every image exactly once, or in the quarantine with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa

from isthmus.config import CaptionConfig, anchored
from isthmus.data.features import FeatureCache
from isthmus.data.manifest import Manifest
from isthmus.data.stream import iter_samples
from isthmus.inference.bulk import Resources, features_fact, open_data, run_bulk, split
from isthmus.inference.commits import Job, Quarantined
from isthmus.inference.engine import Engine, Generation
from isthmus.inference.loading import LoadModel, ModelHandle, resolve_model
from isthmus.inference.pool import Done
from isthmus.inference.rows import Rows

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("caption", pa.string()),
        ("model", pa.string()),
        ("tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class CaptionReport:
    """What a captioning job did; ``expected == captioned + quarantined`` always holds.

    Attributes:
        expected: images in the manifest.
        skipped_chunks: chunks that an earlier run had committed.
        seconds, images_per_s: of this run, with the loading of models.
    """

    expected: int
    captioned: int
    quarantined: int
    skipped_chunks: int
    seconds: float
    images_per_s: float
    out: str


def caption(config: CaptionConfig) -> CaptionReport:
    """Captions every image of ``config.data`` into ``config.out``; a second run does only what is missing.

    Raises:
        RegistryError: the model cannot be found.
        ConfigError: its method writes no captions.
        DataError: ``out`` holds another job's captions, too many images are unreadable, or the books do not balance.
        StorageError: data or ``out`` cannot be reached.
    """
    config = anchored(config)
    handle = resolve_model(config.model, config.tracking)
    load = LoadModel(handle, config.tracking, with_vision=config.cache is None, gpu=config.gpus_per_actor > 0)
    return caption_with(config, handle, load)


def caption_with(config: CaptionConfig, handle: ModelHandle, load: Callable[[], Engine]) -> CaptionReport:
    """:func:`caption` with a given model; ``load`` is called once in each actor and must be picklable."""
    config = anchored(config)
    manifest = open_data(config.data)
    prompt = handle.own_prompt if config.prompt is None else config.prompt
    how = Generation(prompt, config.max_new_tokens, config.min_new_tokens, config.num_beams)
    job = caption_job(handle, manifest, config, how)
    work = OpenCaptionWork(load, config.data, config.cache, config.batch, how)
    give = Resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, config.max_failed_share)
    done = run_bulk("captioning", job, manifest, config.out, config.chunk, work, give)
    return CaptionReport(
        captioned=done.done, **{f.name: getattr(done, f.name) for f in fields(CaptionReport) if f.name != "captioned"}
    )


def caption_job(handle: ModelHandle, manifest: Manifest, config: CaptionConfig, how: Generation) -> Job:
    """What the output is the answer to. ``how.prompt`` is the prompt that is used.

    Earlier releases took "" for the recipe's own prompt and recorded "". Where the recipe has one, captions without any
    are therefore a job of another name than those: neither goes on in the other's folder.
    """
    facts = {
        "model": handle.digest,
        "manifest": manifest.digest,
        "chunk": config.chunk,
        "features": features_fact(config.cache),
        **asdict(how),
    }
    if handle.own_prompt and not how.prompt:
        facts["own_prompt"] = "left out"
    return Job("caption", facts)


@dataclass(frozen=True)
class OpenCaptionWork:
    """Opens model, manifest and cache inside an actor; picklable."""

    load: Callable[[], Engine]
    data: str
    cache: str | None
    batch: int
    how: Generation

    def __call__(self) -> CaptionWork:
        manifest = Manifest.load(self.data)
        engine = self.load()
        cache = FeatureCache.of_model(self.cache, manifest, engine.vision) if self.cache else None
        return CaptionWork(engine, manifest, cache, self.batch, self.how)


class CaptionWork:
    """Rows of the manifest -> captions.

    Args:
        engine: the loaded model.
        manifest: of the data set.
        cache: frozen features to use instead of reading images.
        batch: images per forward pass.
        how: generation settings.
    """

    def __init__(
        self, engine: Engine, manifest: Manifest, cache: FeatureCache | None, batch: int, how: Generation
    ) -> None:
        self._engine, self._manifest, self._cache, self._batch, self._how = engine, manifest, cache, batch, how
        self._rows = Rows(manifest)

    def process(self, rows: Sequence[int]) -> Done:
        """One table row per readable image of ``rows``, in manifest order."""
        table, aside = list[dict[str, Any]](), list[Quarantined]()
        transform = None if self._cache else self._engine.transform
        groups = iter_samples(
            self._manifest, transform=transform, cache=self._cache, rows=list(rows), batch=self._batch
        )
        for group in groups:
            good, bad = split(group)
            aside += bad
            if not good:
                continue
            texts = self._engine.caption(self._engine.features(good), self._how)
            if len(texts) != len(good):
                raise RuntimeError(f"the model gave {len(texts)} captions for {len(good)} images")
            counts = self._engine.count_tokens(texts)
            table += [
                {"id": s.id, "key": s.key, "caption": text, "model": self._engine.name, "tokens": count}
                for s, text, count in zip(good, texts, counts, strict=True)
            ]
        self._rows.complete(rows, [row["id"] for row in table], aside)
        for row, shard in zip(table, self._rows.shards([row["id"] for row in table], rows), strict=True):
            row["shard"] = shard
        return Done(pa.Table.from_pylist(table, schema=SCHEMA), tuple(aside))

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up."""
        return self._rows.blame(row, reason)
