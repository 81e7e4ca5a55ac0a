"""VQAv2's questions and annotations."""

from __future__ import annotations

import re

from isthmus.config import LayoutConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts.checks import (
    FETCH_AGAIN,
    Sources,
    below_folder,
    by_id,
    entries_of,
    no_doubles,
    required,
    stem,
)
from isthmus.evaluation.layouts.types import Extras, Item, Question, Read


def vqav2(config: LayoutConfig, sources: Sources) -> Read:
    """VQAv2: questions, and annotations with ten answers each where they are published."""
    url = config.questions or ""
    table = sources.table(url)
    asked = by_id(url, "questions", entries_of(table, "questions", url), "question_id")
    known = _answers(config.annotations, sources) if config.annotations else {}
    if config.annotations:
        for what, lost, where in (
            ("question", set(asked) - set(known), config.annotations),
            ("annotation", set(known) - set(asked), url),
        ):
            if lost:
                raise DataError(
                    f"{len(lost)} {what}s have no partner in {where} (first question_id {min(lost)}).",
                    "Give the questions and the annotations of one split.",
                )
    name = config.image_name or f"COCO_{table.get('data_subtype') or 'val2014'}_{{:012d}}.jpg"
    images: dict[int, list[Question]] = {}
    for number, entry in asked.items():
        where = f"{url}: question {number}"
        image, text = required(entry, "image_id", int, where), required(entry, "question", str, where)
        of, answered = known.get(number, (image, Question(number, text)))
        if of != image:
            raise DataError(f"{where} is about image {image}, and its annotation about image {of}.", FETCH_AGAIN)
        question = Question(number, text, answered.answers, answered.kind, answered.answer_kind)
        images.setdefault(image, []).append(question)
    items = [
        Item(i, below_folder(_named(name, i), url), (), Extras(tuple(questions))) for i, questions in images.items()
    ]
    training = _answers(config.training, sources) if config.training else {}
    split = config.split or str(table.get("data_subtype") or stem(url))
    return split, items, (), [question for _, question in training.values()]


def _named(template: str, number: int) -> str:
    """``COCO_val2014_{:012d}.jpg`` with the number in it; nothing else in braces means anything."""
    return re.sub(r"\{(?::(0?\d*)d)?\}", lambda found: format(number, f"{found[1] or ''}d"), template)


def _answers(url: str, sources: Sources) -> dict[int, tuple[int, Question]]:
    """question id -> (image id, a question without text)."""
    out = {}
    entries = entries_of(sources.table(url), "annotations", url)
    for number, entry in by_id(url, "annotations", entries, "question_id").items():
        where = f"{url}: question {number}"
        records = entries_of(entry, "answers", where)
        no_doubles(where, "answer_id", [required(record, "answer_id", int, where) for record in records])
        question = Question(
            number,
            "",
            tuple(required(record, "answer", str, where) for record in records),
            str(entry.get("question_type") or ""),
            str(entry.get("answer_type") or ""),
        )
        out[number] = (required(entry, "image_id", int, where), question)
    return out
