"""Is a shard still what was indexed, and does every image, clip and sound of it decode?"""

from __future__ import annotations

import functools

from isthmus import storage
from isthmus.data.clips import faults_of
from isthmus.data.manifest import Manifest
from isthmus.data.ranges import open_range
from isthmus.data.readers import RawSample, failure_of, read_rows
from isthmus.data.records import Problem
from isthmus.data.scan import scan_shard
from isthmus.errors import DataError


def check_shard(url: str, digest: str, number: int) -> list[Problem]:
    """The faults of shard ``number`` of the manifest of ``url`` that has ``digest``.

    The shard is scanned as an index would: whatever is wrong with it is found again, also what is not in the manifest
    because of it.
    """
    manifest = _cached(url, digest)
    shard = manifest.shards[number]
    where = manifest.url(number)
    if not storage.exists(where):
        return [Problem(shard.name, 0, "", "the shard is gone")]
    open_range.forget()  # a handle that was opened before the file was replaced would show the old one
    # Samples without a caption were a fault where none of them is in the manifest.
    need_captions = manifest.captioned == len(manifest)
    try:
        scan = scan_shard(where, shard.name, need_captions, manifest.places)
    except DataError as error:
        return [Problem(shard.name, 0, "", error.problem)]
    problems = list(scan.problems)
    if scan.digest != shard.digest:
        problems.insert(
            0, Problem(shard.name, 0, "", f"the content has changed ({scan.size} bytes, {shard.size} indexed)")
        )
    rows = manifest.rows_of(number)
    for row, sample in zip(rows, read_rows(manifest, rows, sounds=True), strict=True):
        if isinstance(sample, RawSample):
            failures = [failure_of(manifest, row, reason) for reason in faults_of(sample)]
        else:
            failures = [sample]
        problems += [Problem(shard.name, failure.offset, failure.key, failure.reason) for failure in failures]
    return problems


@functools.lru_cache(maxsize=4)
def _cached(url: str, _digest: str) -> Manifest:
    return Manifest.load(url, verify=False)
