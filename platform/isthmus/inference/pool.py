"""Chunks over a pool of Ray actors, with the sample that kills its process found and set aside.

Why plain actors and not ``Dataset.map_batches``: Ray Data gives system failures back to the queue without end
(``max_task_retries=-1``) and does not tell the driver which block was being worked on when a process died, so one
image that crashes a decoder restarts the pool for ever. Chunks here are independent, deterministic and committed by
the actor that made them; nothing of Ray Data's shuffling, fusion or back-pressure is needed to hand them out.

A chunk whose process died is tried once more as it is (the node may have been taken away). After the second death it
is halved, and halved again, until single images are left; an image that takes its process down twice on its own is
quarantined as "killed the process".
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray

from isthmus.data.parallel import store_environment
from isthmus.errors import IsthmusError
from isthmus.inference.commits import Chunk, Commit, Ledger, Quarantined

KILLED = "killed the process"
WHOLE_CHUNK_DEATHS = 2
SINGLE_DEATHS = 2
LOADS = 3  # deaths in a row while the model is loaded: then it is not the node
MAX_DEATHS = 100  # of one run: then it is the machine, not an image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What a worker made of some rows.

    Attributes:
        table: one row per readable image, in manifest order.
        quarantined: the others.
        extras: further tables by folder name, the same names for any rows.
    """

    table: pa.Table
    quarantined: tuple[Quarantined, ...]
    extras: dict[str, pa.Table] = field(default_factory=dict)


class Work(Protocol):
    """A loaded model and an open data set."""

    def process(self, rows: Sequence[int]) -> Done:
        """Rows of the manifest -> table rows and quarantined images; every row ends in one of the two."""
        ...

    def blame(self, row: int, reason: str) -> Quarantined:
        """The quarantine entry of a row that was given up."""
        ...


Open = Callable[[], Work]
"""Called once inside each actor; picklable."""


class Actor:
    """One process with the model loaded once."""

    def __init__(self, open_work: Open, ledger: Ledger, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.open_work = open_work
        self.ledger = ledger

    def ready(self) -> bool:
        """Loads the model. Not done on construction, where Ray would turn any error into the actor's death."""
        self.work = self.open_work()
        return True

    def run(self, chunk: Chunk) -> Commit:
        """Processes a whole chunk and commits it from here: rows do not travel through the driver."""
        done = self.work.process(range(chunk.start, chunk.stop))
        return self.ledger.commit(chunk, done.table, done.quarantined, done.extras)

    def part(self, start: int, stop: int) -> Done:
        """Processes some rows of a chunk that is being isolated; the driver commits the chunk."""
        return self.work.process(range(start, stop))

    def blame(self, row: int) -> Done:
        """The empty answer for a row that kills its process."""
        empty = self.work.process(())
        return Done(empty.table, (self.work.blame(row, KILLED),), empty.extras)


@dataclass
class _Item:
    """A run of rows to be done: a whole chunk, or a piece of one that is being isolated."""

    chunk: Chunk
    start: int
    stop: int
    deaths: int = 0
    accused: bool = False

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (self.chunk.start, self.chunk.stop)


@dataclass
class _Isolation:
    """A chunk in pieces: start row -> what came of the piece."""

    chunk: Chunk
    pieces: dict[int, Done] = field(default_factory=dict)
    rows: int = 0

    def add(self, item: _Item, done: Done) -> bool:
        """True once the pieces make up the chunk."""
        self.pieces[item.start] = done
        self.rows += item.stop - item.start
        return self.rows == len(self.chunk)

    def joined(self) -> Done:
        ordered = [self.pieces[start] for start in sorted(self.pieces)]
        return Done(
            pa.concat_tables([done.table for done in ordered]),
            tuple(q for done in ordered for q in done.quarantined),
            {name: pa.concat_tables([done.extras[name] for done in ordered]) for name in ordered[0].extras},
        )


class Pool:
    """Hands chunks to actors, one at a time each, until all are committed.

    Args:
        open_work: makes the worker inside each actor.
        ledger: where chunks are committed.
        actors: processes at work at once.
        cpus, gpus: Ray resources of each.
    """

    def __init__(self, open_work: Open, ledger: Ledger, *, actors: int, cpus: float, gpus: float) -> None:
        self._make: Any = ray.remote(Actor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._args = (open_work, ledger, store_environment())
        self._ledger = ledger
        self._actors = actors
        self._deaths = self._unready = 0
        self._busy: dict[Any, tuple[Any, _Item | None]] = {}
        self._isolations: dict[int, _Isolation] = {}
        self._queue: deque[_Item] = deque()

    def run(self, plan: Sequence[Chunk]) -> Generator[Commit, None, None]:
        """The commit record of every chunk of ``plan``, as they are finished.

        Raises:
            IsthmusError: what an actor raised; actors that cannot start; too many dead processes.
        """
        self._queue = deque(_Item(chunk, chunk.start, chunk.stop) for chunk in plan)
        try:
            for _ in range(min(self._actors, len(plan))):
                self._start_actor()
            while self._busy:
                finished, _ = ray.wait(list(self._busy), num_returns=1)
                actor, item = self._busy.pop(finished[0])
                commit = self._settle(finished[0], actor, item)
                if commit is not None:
                    yield commit
        finally:
            for actor, _ in self._busy.values():
                ray.kill(actor)
            self._busy.clear()

    def _start_actor(self) -> None:
        actor = self._make.remote(*self._args)
        self._busy[actor.ready.remote()] = (actor, None)

    def _next(self, actor: Any) -> None:
        if not self._queue:
            # Nothing is left to hand out now, but a chunk elsewhere may still fall to pieces: those are then given
            # to the actor that replaces the dead one.
            ray.kill(actor)
            return
        item = self._queue.popleft()
        if item.accused:
            future = actor.blame.remote(item.start)
        elif item.whole and item.chunk.index not in self._isolations:
            future = actor.run.remote(item.chunk)
        else:
            future = actor.part.remote(item.start, item.stop)
        self._busy[future] = (actor, item)

    def _settle(self, future: Any, actor: Any, item: _Item | None) -> Commit | None:
        try:
            answer = ray.get(future)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, IsthmusError) else error from None
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            self._died(item, error)
            return None
        if item is None:
            self._unready = 0
            self._next(actor)
            return None
        commit = answer if isinstance(answer, Commit) else self._piece(item, answer)
        self._next(actor)
        return commit

    def _piece(self, item: _Item, done: Done) -> Commit | None:
        isolation = self._isolations[item.chunk.index]
        if not isolation.add(item, done):
            return None
        del self._isolations[item.chunk.index]
        joined = isolation.joined()
        return self._ledger.commit(item.chunk, joined.table, joined.quarantined, joined.extras)

    def _died(self, item: _Item | None, error: Exception) -> None:
        """Puts a dead actor's work back, smaller where it has died before, and starts another actor."""
        self._deaths += 1
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if item is None:
            self._unready += 1
            if self._unready < LOADS:  # it may have been the node's fault
                log.warning("A worker died while it loaded the model (time %d): %s", self._unready, reason)
                self._start_actor()
                return
            raise IsthmusError(
                f"A bulk worker process died while it loaded the model: {reason}",
                "Give it more memory, or run fewer 'actors' on a machine.",
            ) from error
        if self._deaths > MAX_DEATHS:
            raise IsthmusError(
                f"Bulk worker processes died {self._deaths} times; the last reason was: {reason}",
                "Look at the machine's memory and use a smaller 'batch'; committed chunks are kept.",
            ) from error
        item.deaths += 1
        log.warning("A worker died on rows %d to %d (time %d): %s", item.start, item.stop - 1, item.deaths, reason)
        self._queue.extendleft(reversed(self._retry(item)))
        self._start_actor()

    def _retry(self, item: _Item) -> list[_Item]:
        limit = WHOLE_CHUNK_DEATHS if item.whole else 1
        size = item.stop - item.start
        if size == 1:
            item.accused = item.deaths >= SINGLE_DEATHS
            if item.accused:
                self._isolations.setdefault(item.chunk.index, _Isolation(item.chunk))
            return [item]
        if item.deaths < limit:
            return [item]
        self._isolations.setdefault(item.chunk.index, _Isolation(item.chunk))
        middle = item.start + size // 2
        return [_Item(item.chunk, item.start, middle), _Item(item.chunk, middle, item.stop)]
