"""The tasks of an evaluation: what the workers found, to figures, facts and one row per image."""

from __future__ import annotations

from collections.abc import Callable

from isthmus.evaluation.held import Held, TaskResult
from isthmus.evaluation.ranking_tasks import classification, correspondence, matching, retrieval
from isthmus.evaluation.writing_tasks import captioning, vqa

TASKS: dict[str, Callable[[Held], TaskResult]] = {
    "retrieval": retrieval,
    "captioning": captioning,
    "vqa": vqa,
    "classification": classification,
    "matching": matching,
    "correspondence": correspondence,
}
