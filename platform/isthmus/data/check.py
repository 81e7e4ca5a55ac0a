"""Is a shard still what was indexed, and does every image of it decode?"""

from __future__ import annotations

import functools

from isthmus import storage
from isthmus.data.manifest import Manifest
from isthmus.data.ranges import open_range
from isthmus.data.readers import Failure, RawSample, failure_of, read_rows
from isthmus.data.records import Problem
from isthmus.data.scan import scan_shard
from isthmus.data.transforms import DecodeError, decode_image
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
    for row, sample in zip(rows, read_rows(manifest, rows), strict=True):
        failure = sample if isinstance(sample, Failure) else None
        if isinstance(sample, RawSample):
            try:
                decode_image(sample.image)
            except DecodeError as error:
                failure = failure_of(manifest, row, error.reason)
        if failure is not None:
            problems.append(Problem(shard.name, failure.offset, failure.key, failure.reason))
    return problems


@functools.lru_cache(maxsize=4)
def _cached(url: str, _digest: str) -> Manifest:
    return Manifest.load(url, verify=False)
