"""What an evaluation reads: held-out samples, and captions that a bulk job has written."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.contracts import Sample
from isthmus.data.features import FeatureCache
from isthmus.data.manifest import Manifest
from isthmus.data.readers import Failure
from isthmus.data.stream import iter_samples
from isthmus.errors import DataError

log = logging.getLogger(__name__)


class HeldOut:
    """The first ``limit`` samples of an indexed data set, in manifest order; unreadable ones are counted.

    Args:
        url: data folder.
        limit: how many samples; None for all.
        batch: samples per group.
        cache: URL of a feature cache, or None.

    Raises:
        DataError: not indexed, or without samples.
    """

    def __init__(self, url: str, limit: int | None, batch: int, cache: str | None) -> None:
        self.manifest = Manifest.load(url)
        self.rows = list(range(min(len(self.manifest), limit or len(self.manifest))))
        self.failures: list[Failure] = []
        self._batch, self._cache = batch, cache

    def groups(self, transform: Any = None, *, images: bool = True, vision_digest: str = "") -> Iterator[list[Sample]]:
        """Samples with cached features, or with pixels by ``transform``, or (``images=False``) with captions only.

        Args:
            transform: PIL image -> float32 [3, H, W].
            images: False reads captions only.
            vision_digest: the encoder that the cache must be of.

        Raises:
            DataError: a sample is doubled or missing in what the reader gives, or the cache is of something else.
        """
        self.failures.clear()
        expect = {"manifest_digest": self.manifest.digest} | (
            {"encoder_digest": vision_digest} if vision_digest else {}
        )
        cache = FeatureCache.open(self._cache, expect=expect) if self._cache and images else None
        seen: list[int] = []
        for group in iter_samples(
            self.manifest,
            transform=transform if images and cache is None else None,
            cache=cache,
            rows=self.rows,
            batch=self._batch,
        ):
            seen += [item.id for item in group]
            self.failures += [item for item in group if isinstance(item, Failure)]
            good = [item for item in group if isinstance(item, Sample)]
            if good:
                yield good
        wanted = [int(i) for i in self.manifest.ids[self.rows]]
        if sorted(seen) != sorted(wanted):
            raise DataError(
                f"{self.manifest.root} gave {len(seen)} samples ({len(set(seen))} ids) where {len(wanted)} were asked.",
                "Index the data set again, and build its feature cache again.",
            )
        for failure in self.failures[:3]:
            log.warning("Not scored: %s in %s: %s", failure.key, failure.shard, failure.reason)


@dataclass(frozen=True)
class BulkCaptions:
    """Captions of a finished bulk job.

    Attributes:
        captions: image id -> caption.
        quarantined: ids of images that the job could not read.
        facts: what the job was: generation settings, digests of model and manifest.
        model: the model's name in the rows.
    """

    captions: dict[int, str]
    quarantined: frozenset[int]
    facts: dict[str, Any] = field(default_factory=dict)
    model: str = ""


def read_bulk_captions(url: str, manifest: Manifest) -> BulkCaptions:
    """The output folder of ``isthmus caption``.

    Raises:
        DataError: no finished captioning job is there, it is of other data, or ids are doubled.
    """
    if not storage.exists(storage.join(url, "report.json")):
        there = storage.exists(storage.join(url, "job.json"))
        raise DataError(
            f"{url} holds an unfinished captioning job." if there else f"{url} holds no captioning job.",
            "Run the captioning again; it goes on where it stopped." if there else "Name the 'out' of one.",
        )
    job = json.loads(storage.read_bytes(storage.join(url, "job.json")))
    if job.get("kind") != "caption":
        raise DataError(f"{url} is the output of a job of kind '{job.get('kind')}'.", "Name the 'out' of a captioning.")
    if job["facts"].get("manifest") != manifest.digest:
        raise DataError(f"The captions in {url} are of other data than {manifest.root}.", "Name the data they are of.")
    parts = [part for part, _ in storage.list_files(storage.join(url, "parts"), (".parquet",))]
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(p)), columns=["id", "caption", "model"]) for p in parts]
    table = pa.concat_tables(tables)
    ids = table["id"].to_pylist()
    doubled = [i for i, count in Counter(ids).items() if count > 1]
    if doubled:
        raise DataError(f"{url} holds {len(doubled)} ids more than once (first {doubled[0]}).", "Caption anew.")
    aside = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(url, "quarantine.parquet"))), columns=["id"])
    models = sorted(set(table["model"].to_pylist()))
    return BulkCaptions(
        captions=dict(zip(ids, table["caption"].to_pylist(), strict=True)),
        quarantined=frozenset(aside["id"].to_pylist()),
        facts=dict(job["facts"]),
        model=", ".join(models),
    )
