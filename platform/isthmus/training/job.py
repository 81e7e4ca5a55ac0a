"""What a worker is told, and where it says what it has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from isthmus import storage
from isthmus.config import RunConfig, VisionConfig
from isthmus.contracts import Base
from isthmus.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """All that a worker is told.

    Attributes:
        run: the resolved recipe.
        spec: the method's entry of METHODS. It travels with the job, so a method that the driver registered in its own
            script is known here too.
        samples: rows of the manifest, of all manifests of a mixture.
        parent: local folder of the model that the run starts from, or None.
        lineage: data, parent and code, for the artefact.
        spool: handle of the :class:`isthmus.training.metrics.Spool` actor.
        cached: the frozen encoder behind a feature cache, which the workers' stage does not know.
        mixed: rows of each of the manifests of a mixture.
        environment: variables that say how stores are reached, to lay over a worker's own: a cluster that was there
            before does not have the driver's.
    """

    run: RunConfig
    spec: Any
    samples: int
    parent: str | None
    lineage: Mapping[str, Any]
    spool: Any
    cached: tuple[Base, ...] = ()
    mixed: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each data set."""
        return self.mixed or (self.samples,)

    @property
    def folder(self) -> str:
        return storage.join(self.run.storage, self.run.name)

    @property
    def checkpoints(self) -> str:
        return storage.join(self.folder, "checkpoints")

    @property
    def vision(self) -> VisionConfig:
        """The frozen image encoder that the recipe names.

        Raises:
            ConfigError: the method has none.
        """
        found = getattr(self.run.method, "vision", None)
        if not isinstance(found, VisionConfig):
            raise ConfigError(
                f"The method '{self.run.method.name}' names no image encoder, and data.placement "
                f"'{self.run.data.placement}' needs one.",
                "Set data.placement to 'inline'.",
            )
        return found


class Out(Protocol):
    """Where a worker's rows, events and small files go; see :class:`isthmus.training.metrics.Spool`."""

    def append(self, row: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def artefact(self, name: str, data: bytes) -> None: ...


class ActorOut:
    """A spool in another process. Nothing waits for rows and events; a file is waited for, since it would be lost if
    this process, which holds it, ended before it has arrived."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def append(self, row: Mapping[str, Any]) -> None:
        self.actor.append.remote(row)

    def event(self, event: Mapping[str, Any]) -> None:
        self.actor.event.remote(event)

    def artefact(self, name: str, data: bytes) -> None:
        import ray

        ray.get(self.actor.artefact.remote(name, data), timeout=60.0)
