"""What bulk captioning and bulk embedding share: plan, skip what is done, run the rest, balance the books."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import ray

from isthmus import storage
from isthmus.contracts import Sample
from isthmus.data.features import read_meta
from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import Failure
from isthmus.errors import DataError
from isthmus.inference.cluster import connect
from isthmus.inference.commits import Chunk, Job, Ledger, Quarantined, chunks
from isthmus.inference.pool import Open, Pool
from isthmus.inference.rows import Ids, from_failure
from isthmus.progress import Tracker, progress

TOLERATED = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkReport:
    """What a bulk job did, after its books balanced.

    Attributes:
        expected: images in the manifest; always done + quarantined.
        done: images with a row in ``parts``.
        quarantined: images listed in ``quarantine.parquet``.
        skipped_chunks: chunks that an earlier run had committed.
        seconds: this run's wall clock, with the loading of models.
        images_per_s: images of this run by those seconds.
    """

    expected: int
    done: int
    quarantined: int
    skipped_chunks: int
    seconds: float
    images_per_s: float
    out: str


@dataclass(frozen=True)
class Resources:
    """Processes, what each is given, and how many bad images a job bears."""

    actors: int
    cpus: float
    gpus: float
    max_failed_share: float


def open_data(url: str) -> Manifest:
    """The manifest of a data folder, made first where there is none.

    Raises:
        DataError, StorageError: no shards there, or the folder cannot be read (or, without manifest, written).
    """
    if not storage.exists(storage.join(url, "manifest.json")):
        report = index(url, captions="optional")
        for problem in report.problems[:5]:
            log.warning("Not indexed, and therefore not part of the job: %s", problem)
        if report.problems:
            log.warning("%d records of %s could not be indexed.", len(report.problems), url)
    return Manifest.load(url)


def run_bulk(
    label: str, job: Job, manifest: Manifest, out: str, chunk: int, open_work: Open, give: Resources
) -> BulkReport:
    """Every image of ``manifest`` exactly once into ``out``, whatever happened before.

    Raises:
        DataError: ``out`` belongs to another job; more unreadable images than allowed; books that do not balance.
        IsthmusError: a worker cannot start, or workers keep dying.
        KeyboardInterrupt: as it came; committed chunks stay and the way to resume was said on standard error.
    """
    started = time.monotonic()
    plan = chunks(len(manifest), chunk)
    if not plan:
        raise DataError(f"{manifest.root} lists no images.", "Check the folder's shards with `isthmus data check`.")
    ledger = Ledger(out, job)
    ledger.open()
    committed = ledger.committed(plan)
    left = [c for c in plan if c.index not in committed]
    bad = sum(record.quarantined for record in committed.values())
    bearable = allowance(len(manifest), give.max_failed_share)
    with progress(label, total=sum(map(len, left)), unit="images") as tracker:
        _refuse_too_many(bad, bearable, len(manifest), out)
        if left:
            _run_chunks(left, ledger, open_work, give, tracker, bad, bearable, len(manifest), len(plan))
    rows, quarantined = ledger.reconcile(plan, Ids(manifest))
    if rows + len(quarantined) != len(manifest):
        raise DataError(f"{out} holds {rows} rows and {len(quarantined)} quarantined of {len(manifest)} images.")
    seconds = time.monotonic() - started
    report = BulkReport(
        expected=len(manifest),
        done=rows,
        quarantined=len(quarantined),
        skipped_chunks=len(committed),
        seconds=round(seconds, 3),
        images_per_s=round(sum(map(len, left)) / seconds, 2),
        out=out,
    )
    ledger.close(quarantined, {**asdict(report), "job": job.digest})
    return report


def split(group: Sequence[Sample | Failure]) -> tuple[list[Sample], list[Quarantined]]:
    """The readable samples of a group, and the others as quarantine rows."""
    good = [item for item in group if isinstance(item, Sample)]
    return good, [from_failure(item) for item in group if isinstance(item, Failure)]


def features_fact(cache: str | None) -> str:
    """Where a job's image features come from, as a fact of the job.

    Raises:
        DataError: the cache is not there or not finished.
    """
    if cache is None:
        return "images"
    meta = read_meta(cache)
    return f"cache of {meta.dtype}, encoder {meta.encoder_digest}, transform {meta.transform_digest}"


def _run_chunks(
    left: list[Chunk],
    ledger: Ledger,
    open_work: Open,
    give: Resources,
    tracker: Tracker,
    bad: int,
    allowance: int,
    samples: int,
    planned: int,
) -> None:
    finished = planned - len(left)
    started_ray = connect(min(give.actors, len(left)), give.cpus, give.gpus)
    pool = Pool(open_work, ledger, actors=give.actors, cpus=give.cpus, gpus=give.gpus)
    running = pool.run(left)
    try:
        for commit in running:
            finished += 1
            bad += commit.quarantined
            tracker.advance(commit.stop - commit.start)
            tracker.update(quarantined=bad)
            _refuse_too_many(bad, allowance, samples, ledger.out)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. {finished} of {planned} chunks are committed under {ledger.out}. "
            "Run the same command again to go on from there.",
            file=sys.stderr,
        )
        raise
    finally:
        running.close()
        if started_ray:
            ray.shutdown()


def allowance(samples: int, share: float) -> int:
    """How many unreadable images a job bears. A share of 0 means none; else a handful never stops a small set."""
    return max(math.floor(samples * share), TOLERATED) if share > 0 else 0


def _refuse_too_many(bad: int, allowance: int, samples: int, out: str) -> None:
    if bad > allowance:
        raise DataError(
            f"{bad} of {samples} images could not be read, more than max_failed_share allows ({allowance}).",
            f"The reasons are in {storage.join(out, 'quarantine')}. Mend the data or raise max_failed_share.",
        )
