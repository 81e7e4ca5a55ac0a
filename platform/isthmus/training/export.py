"""The artefact that a finished training leaves."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus import storage
from isthmus.contracts import Base, Stage
from isthmus.models.partition import whole_shape
from isthmus.training import checkpoint
from isthmus.training.job import Job


def write_artefact(job: Job, stage: Stage, state: dict[str, Tensor], elsewhere: Sequence[Base]) -> dict[str, Any]:
    """Writes the run's artefact folder; returns what the driver is told of it.

    Args:
        state: the parameters outside the backbones, whole.
        elsewhere: frozen parts that ran outside the workers.
    """
    from isthmus.methods.artefact import save_artefact
    from isthmus.registry.manifest import with_bases

    target = storage.join(job.folder, "artefact")
    known = {base.role for base in stage.bases}
    bases = (*stage.bases, *(base for base in elsewhere if base.role not in known))
    facts = with_bases(job.lineage, bases)
    with _artefact_folder(target) as folder:
        save_artefact(folder, state, job.run, stage, facts, bases=bases)
    parameters = list(stage.module.parameters())
    return {
        "url": target,
        "trainable": sum(_numel(p) for p in parameters if p.requires_grad),
        "frozen": sum(_numel(p) for p in parameters if not p.requires_grad),
        "bases": facts["bases"],
    }


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(whole_shape(parameter))


class _artefact_folder:  # noqa: N801 - used as a function
    """A folder to write into; at the end it replaces ``url`` (a rename locally, an upload elsewhere)."""

    def __init__(self, url: str) -> None:
        self.url = url
        parent = storage.local_path(url).parent if storage.is_local(url) else None
        self._temporary = tempfile.TemporaryDirectory(prefix=".artefact-", dir=parent)

    def __enter__(self) -> Path:
        folder = Path(self._temporary.name) / "artefact"
        folder.mkdir()
        return folder

    def __exit__(self, kind: Any, *_: Any) -> None:
        folder = Path(self._temporary.name) / "artefact"
        try:
            if kind is None:
                storage.delete(self.url)
                if storage.is_local(self.url):
                    folder.replace(storage.local_path(self.url))
                else:
                    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                        checkpoint.put_file(file, storage.join(self.url, *file.relative_to(folder).parts))
        finally:
            self._temporary.cleanup()
