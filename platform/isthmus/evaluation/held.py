"""What the tasks of an evaluation work on, the images that are held out, and what each of them gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.data.readers import Failure
from isthmus.errors import DataError
from isthmus.evaluation.pool import Runner
from isthmus.evaluation.sources import Source
from isthmus.evaluation.work import Kind, Order, Part

Rows = dict[int, dict[str, Any]]


@dataclass
class TaskResult:
    """Figures, what they were measured under, per-image columns by image id, and what could not be computed and why.

    Attributes:
        files: further files of results by name, as JSON values.
    """

    metrics: dict[str, float]
    facts: dict[str, Any]
    rows: Rows = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


@dataclass
class Held:
    """The images that are evaluated: the first ``limit`` of the source.

    Attributes:
        failures: what could not be read, by id; filled by :meth:`gather`.
    """

    source: Source
    runner: Runner
    config: EvaluateConfig
    failures: dict[int, Failure] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Row numbers of the source."""
        return list(range(min(len(self.source.ids), self.config.limit or len(self.source.ids))))

    def gather(
        self,
        kind: Kind,
        label: str,
        *,
        extras: bool = False,
        rows: Sequence[int] | None = None,
        texts: Sequence[Sequence[str]] = (),
    ) -> Part:
        """One kind of work on all rows, as one part.

        Raises:
            DataError: rows missing or doubled, or not one image can be read.
        """
        order = Order(
            kind, tuple(self.rows if rows is None else rows), tuple(tuple(some) for some in texts), extras=extras
        )
        whole, images, vectors, sounds = Part(), list[Tensor](), list[Tensor](), list[Tensor]()
        for part in self.runner.run(order, label):
            for name in ("ids", "keys", "captions", "extras", "failures", "made", "answers", "scores"):
                getattr(whole, name).extend(getattr(part, name))
            images += [] if part.images is None else [part.images]
            vectors += [] if part.texts is None else [part.texts]
            sounds += [] if part.sounds is None else [part.sounds]
        self.failures |= {failure.id: failure for failure in whole.failures}
        if not whole.ids:
            reason = f" The first: {whole.failures[0].key}: {whole.failures[0].reason}." if whole.failures else ""
            raise DataError(f"None of the samples of {self.source.root} can be read.{reason}", "Check the data set.")
        whole.images = torch.cat(images) if images else None
        whole.texts = torch.cat(vectors) if vectors else None
        whole.sounds = torch.cat(sounds) if sounds else None
        return whole
