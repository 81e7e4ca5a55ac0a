"""When a worker's state is written, and what happens where it cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from isthmus.errors import ConfigError, StorageError, nearest
from isthmus.training import checkpoint
from isthmus.training.comm import TorchComm
from isthmus.training.job import Job

_MOST_UNWRITTEN = 3
"""Checkpoints in a row that could not be written and that a run bears."""


class Saving:
    """The checkpoints of one try of a run.

    Args:
        job: what is trained.
        engine: DeepSpeed's.
        comm: the run's group.
        attempt: number of the try; part of the folders' names.
        identity: what every checkpoint of this run is a state of.
        note: takes (kind, facts) for the driver.
    """

    def __init__(
        self,
        job: Job,
        engine: Any,
        comm: TorchComm,
        attempt: int,
        identity: Mapping[str, str],
        note: Callable[..., None],
    ) -> None:
        self.job, self.train, self.engine, self.comm = job, job.run.train, engine, comm
        self.attempt, self.identity, self.note = attempt, dict(identity), note
        self.pending: checkpoint.Pending | None = None
        self._unwritten = 0
        self._watched: list[float] = []

    @property
    def written(self) -> bool:
        """Whether this rank has written its share of the checkpoint under way; true where none is."""
        return self.pending is None or self.pending.done

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the value that decides which checkpoint is the best.

        Raises:
            ConfigError: ``train.keep_best`` is no value that is logged.
        """
        name = self.train.keep_best
        if name is None:
            return
        if name in values:
            self._watched.append(values[name])
        elif step == 0:  # later steps may leave a loss out
            raise ConfigError(
                f"train.keep_best is '{name}', which this method does not log.{nearest(name, values)}",
                f"It logs: {', '.join(values)}.",
            )

    def begin(self, done: int) -> None:
        """A checkpoint behind step ``done``, written beside training; the last one is waited for. Collective."""
        if self.pending is not None:
            self.settle()
        self.pending = checkpoint.begin(
            self.engine, self.job.checkpoints, done,
            attempt=self.attempt, zero_stage=self.job.run.zero.stage, comm=self.comm, run=self.identity,
            score=sum(self._watched) / len(self._watched) if self._watched else None,
        )  # fmt: skip
        self._watched.clear()
        if done == self.train.steps:
            self.settle()

    def settle(self) -> None:
        """Close the checkpoint under way. One that cannot be written costs the run nothing but that checkpoint, unless
        it is the last one or the third in a row. Collective.

        Raises:
            StorageError: in those cases.
        """
        pending, self.pending = self.pending, None
        assert pending is not None
        first = self.comm.rank == 0
        try:
            checkpoint.settle(pending, self.comm)
        except StorageError as error:
            self._unwritten += 1
            if pending.step == self.train.steps or self._unwritten >= _MOST_UNWRITTEN:
                raise
            if first:
                self.note("unwritten", step=pending.step, reason=str(error))
            return
        self._unwritten = 0
        if first:
            with contextlib.suppress(StorageError):  # tried again behind the next one
                checkpoint.prune(
                    self.job.checkpoints, self.train.keep_checkpoints, keep_best=self.train.keep_best is not None,
                    upto=pending.step, run=self.identity,
                )  # fmt: skip
            self.note("checkpoint", step=pending.step)
