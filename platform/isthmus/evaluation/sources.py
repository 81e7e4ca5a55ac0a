"""Where an evaluation's images come from: an indexed data set, or one in a published layout. Read by row numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from isthmus import storage
from isthmus.config import EvaluateConfig
from isthmus.contracts import Sample
from isthmus.data.clips import clip_transform
from isthmus.data.features import EncodedBy, FeatureCache
from isthmus.data.labels import label_of
from isthmus.data.local import to_sample
from isthmus.data.manifest import Manifest
from isthmus.data.questions import parse_questions
from isthmus.data.readers import Failure, RawSample, failure_of, read_rows
from isthmus.data.transforms import DecodeError, decode_image
from isthmus.errors import IsthmusError
from isthmus.evaluation.layouts import Extras, Layout, Question, as_negatives, read_layout

Transform = Callable[[Any], np.ndarray]
Entry = tuple[Sample | Failure, Extras]


class Source(Protocol):
    """Images in a fixed order.

    Attributes:
        root, split, digest: URL, name of the split, and what the results call its content.
        ids: int64, one per row.
        classes: every class name, where the data set lists them.
        training: questions whose answers make a prior, where there are any.
    """

    root: str
    split: str
    digest: str
    ids: np.ndarray
    classes: tuple[str, ...]
    training: tuple[Question, ...]

    def read(self, rows: Sequence[int], transform: Transform | None, *, images: bool, extras: bool) -> list[Entry]:
        """The rows, one for one: a sample or why it cannot be read, and what else is said of it.

        Args:
            transform: PIL image -> float32 [3, H, W].
            images: False reads captions alone, and asks for no image or feature.
            extras: whether questions, labels and negatives are wanted; else they are empty.
        """
        ...


def open_source(config: EvaluateConfig, encoder: EncodedBy | None = None) -> Source:
    """The data that the recipe names.

    Args:
        config: anchored.
        encoder: what a feature cache must be of; None for any.

    Raises:
        DataError: not indexed, not of its layout, or a cache of something else.
    """
    if config.layout:
        return LayoutSource(read_layout(config.layout))
    assert config.data is not None  # the configuration's own rule
    return IndexedSource(config.data, config.cache, encoder)


class IndexedSource:
    """Shards with a manifest; questions, label and negatives stand in a sample's JSON member."""

    classes: tuple[str, ...] = ()
    training: tuple[Question, ...] = ()

    def __init__(self, url: str, cache: str | None = None, encoder: EncodedBy | None = None) -> None:
        self.manifest = Manifest.load(url)
        self.root, self.digest = url, self.manifest.digest
        self.split = url.rstrip("/").rsplit("/", 1)[-1]
        self.ids = self.manifest.ids
        self._cache: FeatureCache | None = None
        if cache and encoder:
            self._cache = FeatureCache.of_model(cache, self.manifest, encoder)
        elif cache:
            self._cache = FeatureCache.open(cache, expect={"manifest_digest": self.manifest.digests})

    def read(self, rows: Sequence[int], transform: Transform | None, *, images: bool, extras: bool) -> list[Entry]:
        if self._cache is not None and images and not extras:
            return [(self._cached(row), Extras()) for row in rows]
        decode = transform if images and self._cache is None else None
        size = getattr(decode, "size", None)
        out: list[Entry] = []
        heard = clip_transform(decode) is not None
        for row, raw in zip(rows, read_rows(self.manifest, rows, sounds=heard), strict=True):
            more = self._extras(raw) if extras and isinstance(raw, RawSample) else Extras()
            if self._cache is not None and images:
                out.append((self._cached(row), more))
            else:
                out.append((to_sample(self.manifest, row, raw, decode, size), more))
        return out

    def _cached(self, row: int) -> Sample | Failure:
        assert self._cache is not None
        sample = self._cache.get(int(self.ids[row]))
        reason = "the image was unreadable when it was encoded"
        return sample if sample is not None else failure_of(self.manifest, row, reason)

    def _extras(self, raw: RawSample) -> Extras:
        where = f"{self.root}: sample {raw.key}"
        return Extras(
            questions=parse_questions(raw.meta, raw.id, where),
            label=label_of(raw.meta),
            negatives=as_negatives(raw.meta.get("negatives"), where),
        )


class LayoutSource:
    """Image files named by annotations."""

    def __init__(self, layout: Layout) -> None:
        self.root, self.split, self.digest = layout.root, layout.split, layout.digest
        self.ids = np.asarray([item.id for item in layout.items], np.int64)
        self.classes, self.training = layout.classes, layout.training
        self._items = layout.items

    def read(self, rows: Sequence[int], transform: Transform | None, *, images: bool, extras: bool) -> list[Entry]:
        del extras  # they are here already
        return [(self._sample(row, transform if images else None), self._items[row].extras) for row in map(int, rows)]

    def _sample(self, row: int, transform: Transform | None) -> Sample | Failure:
        item = self._items[row]
        if transform is None:
            return Sample(item.id, item.file, item.captions)
        data = b""
        try:
            data = storage.read_bytes(storage.join(self.root, item.file))
            pixels = transform(decode_image(data, at_least=getattr(transform, "size", None)))
        except IsthmusError as error:
            return Failure(item.id, item.file, self.root, 0, error.problem)
        except DecodeError as error:
            return Failure(item.id, item.file, self.root, 0, error.reason, hashlib.sha256(data).hexdigest())
        return Sample(item.id, item.file, item.captions, pixels_CHW=pixels)
