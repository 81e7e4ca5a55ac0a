"""Bulk embeddings of images and texts, through the same books as captioning.

B images, Q query tokens (1 for single-vector methods), E shared embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from isthmus.config import EmbedConfig, anchored
from isthmus.contracts import Sample
from isthmus.data.clips import ClipTransform
from isthmus.data.features import FeatureCache
from isthmus.data.manifest import Manifest
from isthmus.data.stream import iter_samples
from isthmus.errors import ConfigError
from isthmus.inference.bulk import Resources, features_fact, open_data, run_bulk, split
from isthmus.inference.commits import Job, Quarantined
from isthmus.inference.engine import Engine
from isthmus.inference.loading import LoadModel, ModelHandle, resolve_model
from isthmus.inference.pool import Done
from isthmus.inference.rows import Rows

IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("model", pa.string()),
        ("embeddings", pa.list_(pa.list_(pa.float32()))),
    ]
)
TEXT_SCHEMA = pa.schema(
    [("id", pa.int64()), ("caption_index", pa.int32()), ("text", pa.string()), ("embedding", pa.list_(pa.float32()))]
)
SOUND_SCHEMA = pa.schema([("id", pa.int64()), ("key", pa.string()), ("embedding", pa.list_(pa.float32()))])
TEXTS, SOUNDS = "texts", "sounds"


@dataclass(frozen=True)
class EmbedReport:
    """What an embedding job did; ``expected == images + quarantined`` always holds.

    Attributes:
        expected: images in the manifest.
        images: rows in ``parts``; with their [Q, E] unit vectors where images were asked for.
        skipped_chunks: chunks that an earlier run had committed.
        seconds, images_per_s: of this run, with the loading of models.
    """

    expected: int
    images: int
    quarantined: int
    skipped_chunks: int
    seconds: float
    images_per_s: float
    out: str


def embed(config: EmbedConfig) -> EmbedReport:
    """Embeds every image (``parts/``) and every caption (``texts/``) of ``config.data`` into ``config.out``.

    ``parts``: id, key, shard, model, embeddings [Q][E] float32 (null without ``images``).
    ``texts``: id, caption_index, text, embedding [E] float32. A model of sounds writes ``sounds/`` in their place:
    id, key, embedding [E] float32; its images may be clips.

    Raises:
        ConfigError: neither images nor texts are asked for, or the model's method has no shared space.
        RegistryError, DataError, StorageError: as :func:`isthmus.inference.caption.caption`.
    """
    config = anchored(config)
    handle = resolve_model(config.model, config.tracking)
    vision = config.images and config.cache is None
    return embed_with(
        config, handle, LoadModel(handle, config.tracking, with_vision=vision, gpu=config.gpus_per_actor > 0)
    )


def embed_with(config: EmbedConfig, handle: ModelHandle, load: Callable[[], Engine]) -> EmbedReport:
    """:func:`embed` with a given model; ``load`` is called once in each actor and must be picklable."""
    if not (config.images or config.texts):
        raise ConfigError("Both 'images' and 'texts' are false.", "Ask for at least one of them.")
    config = anchored(config)
    manifest = open_data(config.data)
    job = Job(
        "embed",
        {
            "model": handle.digest,
            "manifest": manifest.digest,
            "chunk": config.chunk,
            "features": features_fact(config.cache),
            "images": config.images,
            "texts": config.texts,
        },
    )
    work = OpenEmbedWork(load, config.data, config.cache, config.batch, config.images, config.texts)
    give = Resources(config.actors, config.cpus_per_actor, config.gpus_per_actor, config.max_failed_share)
    done = run_bulk("embedding", job, manifest, config.out, config.chunk, work, give)
    return EmbedReport(
        expected=done.expected,
        images=done.done,
        quarantined=done.quarantined,
        skipped_chunks=done.skipped_chunks,
        seconds=done.seconds,
        images_per_s=done.images_per_s,
        out=done.out,
    )


@dataclass(frozen=True)
class OpenEmbedWork:
    """Opens model, manifest and cache inside an actor; picklable."""

    load: Callable[[], Engine]
    data: str
    cache: str | None
    batch: int
    images: bool
    texts: bool

    def __call__(self) -> EmbedWork:
        manifest = Manifest.load(self.data)
        engine = self.load()
        cache = FeatureCache.of_model(self.cache, manifest, engine.vision) if self.cache else None
        return EmbedWork(engine, manifest, cache, self.batch, images=self.images, texts=self.texts)


class EmbedWork:
    """Rows of the manifest -> image and text vectors.

    Args:
        engine: the loaded model.
        manifest: of the data set.
        cache: frozen features to use instead of reading images.
        batch: images (and captions) per forward pass.
    """

    def __init__(
        self, engine: Engine, manifest: Manifest, cache: FeatureCache | None, batch: int, *, images: bool, texts: bool
    ) -> None:
        self._engine, self._manifest, self._cache, self._batch = engine, manifest, cache, batch
        self._images, self._texts = images, texts
        self._rows = Rows(manifest)

    def process(self, rows: Sequence[int]) -> Done:
        """One image row per readable image of ``rows`` and one text row per caption, in manifest order."""
        images, others, aside = list[dict[str, Any]](), list[dict[str, Any]](), list[Quarantined]()
        hears = self._engine.hears and self._texts
        transform = self._engine.transform if (self._images or hears) and not self._cache else None
        if isinstance(transform, ClipTransform):  # a library of silent clips may be searched by sound
            transform = replace(transform, sees=self._images, hears=hears)
        groups = iter_samples(
            self._manifest, transform=transform, cache=self._cache, rows=list(rows), batch=self._batch
        )
        for group in groups:
            good, bad = split(group)
            aside += bad
            if good:
                images += self._image_rows(good)
                others += self._other_rows(good) if self._texts else []
        ids = [row["id"] for row in images]
        self._rows.complete(rows, ids, aside)
        for row, shard in zip(images, self._rows.shards(ids, rows), strict=True):
            row["shard"] = shard
        name, schema = (SOUNDS, SOUND_SCHEMA) if hears else (TEXTS, TEXT_SCHEMA)
        extras = {name: pa.Table.from_pylist(others, schema=schema)} if self._texts else {}
        return Done(pa.Table.from_pylist(images, schema=IMAGE_SCHEMA), tuple(aside), extras)

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up."""
        return self._rows.blame(row, reason)

    def _image_rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        vectors: list[Any] = [None] * len(samples)
        if self._images:
            vectors = self._engine.embed_images(self._engine.features(samples)).cpu().tolist()
        return [
            {"id": s.id, "key": s.key, "model": self._engine.name, "embeddings": v}
            for s, v in zip(samples, vectors, strict=True)
        ]

    def _other_rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Of the other side: a row for each caption, or for each sound."""
        if not self._engine.hears:
            return self._text_rows(samples)
        vectors = self._engine.embed_sounds(samples).cpu().tolist()
        return [{"id": s.id, "key": s.key, "embedding": v} for s, v in zip(samples, vectors, strict=True)]

    def _text_rows(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        flat = [(s.id, index, text) for s in samples for index, text in enumerate(s.captions)]
        out: list[dict[str, Any]] = []
        for start in range(0, len(flat), self._batch):
            some = flat[start : start + self._batch]
            vectors = self._engine.embed_texts([text for _, _, text in some]).cpu().tolist()
            out += [
                {"id": i, "caption_index": n, "text": text, "embedding": v}
                for (i, n, text), v in zip(some, vectors, strict=True)
            ]
        return out
