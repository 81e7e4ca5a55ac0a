"""Captions that a bulk job has written."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from isthmus import storage
from isthmus.data.manifest import Manifest
from isthmus.errors import DataError


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
