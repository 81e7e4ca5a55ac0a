"""What happens to samples that cannot be read: they are counted, written down, and too many of them stop the run."""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from isthmus import storage
from isthmus.data.readers import Failure
from isthmus.errors import DataError

_SETTLED = 1000
"""Rows after which a share is taken at face value; before that a few failures in the first batches would decide."""


class FailureBudget:
    """Counts failed samples and raises when their share is too large.

    The share is taken over the samples seen, or over the data set (at most 1,000 samples) while fewer have been seen,
    so that one bad image in the first batch of a large set stops nothing and a set that is all bad stops early. A
    sample that fails again in a later epoch counts once more on both sides.

    Args:
        samples: samples of the data set.
        most: largest share that is borne, 0 to 1.
        where: the data set's URL, for the message.
    """

    def __init__(self, samples: int, most: float, where: str) -> None:
        self._floor, self._most, self._where = min(samples, _SETTLED), most, where
        self.seen = 0
        self.failed = 0
        self._reasons: Counter[str] = Counter()
        self._first: list[Failure] = []

    def count(self, seen: int, failures: list[Failure]) -> None:
        """``seen`` rows were read, ``failures`` among them.

        Raises:
            DataError: the share of failures is above the limit; sums up what failed and why.
        """
        self.seen += seen
        self.failed += len(failures)
        self._reasons.update(_kind(failure.reason) for failure in failures)
        self._first = (self._first + failures)[:3]
        base = max(self.seen, self._floor)
        if self.failed > self._most * base:
            raise DataError(
                f"{self.failed} of {self.seen} samples read from {self._where} are unreadable, "
                f"more than the share of {self._most:g} allowed: {self.summary()}.",
                "Mend the shards (`isthmus data check` lists every fault) or raise data.max_failed_share.",
            )

    def summary(self) -> str:
        """The reasons with their counts, and the first samples."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self._reasons.most_common(3))
        first = ", ".join(f"{failure.shard} at {failure.offset} ({failure.key})" for failure in self._first)
        return f"{reasons}; first: {first}"


def check_cut(cut: int, seen: int, samples: int, most: float, where: str) -> None:
    """Refuse a data set whose captions the recipe's token limit cuts too often; the base is :class:`FailureBudget`'s.

    Args:
        cut: captions that lost their end so far, over all workers.
        seen: captions read so far.
        samples: samples of the data set.
        most: largest share that is borne, 0 to 1.
        where: the data set's URL, for the message.

    Raises:
        DataError: the share of cut captions is above the limit.
    """
    if cut > most * max(seen, min(samples, _SETTLED)):
        raise DataError(
            f"{cut} of {seen} captions read from {where} are longer than the recipe's max_length and lost their end, "
            f"more than the share of {most:g} allowed.",
            "Raise method.text.max_length or method.language.max_length, or raise data.max_cut_share to train on the "
            "beginnings of such captions.",
        )


class Quarantine:
    """Failures on their way to JSON lines below a folder or URL. Safe to use from several threads and processes.

    Every flush is a new file, because object stores cannot append; :func:`read_quarantine` joins them.
    """

    def __init__(self, url: str, flush_every: int = 100) -> None:
        self._url, self._every = url, flush_every
        self._writer, self._number = uuid.uuid4().hex[:12], 0
        self._waiting: list[Failure] = []
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def add(self, failure: Failure) -> None:
        """Note a failure; the same sample is written once per writer."""
        with self._lock:
            if failure.id in self._known:
                return
            self._known.add(failure.id)
            self._waiting.append(failure)
            full = len(self._waiting) >= self._every
        if full:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            number, self._number = self._number, self._number + bool(waiting)
        if waiting:
            lines = "".join(json.dumps(asdict(failure)) + "\n" for failure in waiting)
            storage.write_bytes(storage.join(self._url, f"{self._writer}-{number:05d}.jsonl"), lines.encode())

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def read_quarantine(url: str) -> Iterator[Failure]:
    """Every quarantined sample below ``url``, once."""
    known: set[int] = set()
    if not storage.exists(url):
        return
    for file, _ in storage.list_files(url, (".jsonl",)):
        for line in storage.read_bytes(file).decode().splitlines():
            failure = Failure(**json.loads(line))
            if failure.id not in known:
                known.add(failure.id)
                yield failure


def _kind(reason: str) -> str:
    """A reason without what differs from sample to sample."""
    return reason.partition(":")[0].partition("(")[0].strip()
