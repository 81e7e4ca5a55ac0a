"""One worker's run in this process, and what it says. Shared by distributed tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from isthmus.config import RunConfig
from isthmus.data.manifest import Manifest
from isthmus.methods import METHODS, MethodSpec

if TYPE_CHECKING:
    from isthmus.training.worker import Worker


@dataclass
class Kept:
    """Takes what a worker says, and keeps it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    artefacts: dict[str, bytes] = field(default_factory=dict)

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def artefact(self, name: str, data: bytes) -> None:
        self.artefacts[name] = data


def worker_of(config: RunConfig, spec: MethodSpec | None = None, parent: str | None = None) -> tuple[Worker, Kept]:
    """A worker of a run on one data set, which is not started yet, and what will hold its words.

    Args:
        config: of the run.
        spec: its method, where METHODS does not have it.
        parent: folder of the model that it goes on from.
    """
    from isthmus.training.worker import Job, Worker

    samples = len(Manifest.load(config.data.train))
    job = Job(config, spec or METHODS[config.method.name], samples, parent, {"data": {}}, None)
    return Worker(job, torch.device("cpu"), kept := Kept()), kept


def losses(row: dict[str, Any]) -> dict[str, float]:
    """The losses of a logged row, by name."""
    return {name: value for name, value in row["metrics"].items() if name.startswith("loss")}
