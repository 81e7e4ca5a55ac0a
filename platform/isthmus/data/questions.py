"""Questions about images: how they stand in a sample's JSON, and how training gets them beside pixels or features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from isthmus.contracts import Question, Sample
from isthmus.data.local import LocalRows, Row
from isthmus.data.manifest import Manifest
from isthmus.data.order import SampleOrder
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.sets import Sets
from isthmus.errors import DataError

HEAD = 1  # bytes of an image that are asked for where only its JSON is wanted


def parse_questions(meta: Mapping[str, Any], sample: int | str, where: str) -> tuple[Question, ...]:
    """The entries of ``questions`` in a sample's JSON: objects with ``question``, ``answers`` (texts or objects) or
    ``answer``, and perhaps ``question_id``, ``question_type`` and ``answer_type``.

    Args:
        meta: the JSON.
        sample: the sample's id, which names questions that have none of their own.
        where: the sample in words, for messages.

    Raises:
        DataError: entries of another form.
    """
    asked = meta.get("questions") or []
    if not isinstance(asked, list):
        raise DataError(f"{where}: 'questions' is no list.", "Write a list of objects with 'question', 'answers'.")
    return tuple(_question(entry, f"{sample}#{n}", where) for n, entry in enumerate(asked))


def _question(entry: Any, number: str, where: str) -> Question:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("question"), str):
        raise DataError(f"{where}: an entry of 'questions' has no text 'question'.", "Mend the sample's JSON.")
    given = entry.get("answers", [entry["answer"]] if "answer" in entry else [])
    answers: list[Any] = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in given]
    if not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: an answer to '{entry['question']}' is no text.", "Mend the sample's JSON.")
    kinds = str(entry.get("question_type") or ""), str(entry.get("answer_type") or "")
    return Question(entry.get("question_id", number), entry["question"], tuple(answers), *kinds)


def with_questions(
    source: Iterable[LocalRows], sets: Sets, order: SampleOrder, rank: int, world: int
) -> Iterator[LocalRows]:
    """The same rows, each sample with its questions, which are read from the shards wherever the image came from."""
    for local in source:
        numbers = order.local(local.step, rank, world)
        rows: list[Row] = list(local.rows)
        for number, here, own in sets.by_set(numbers):
            found = read_questions(sets.manifests[number], own.tolist())
            for place, questions in zip(np.flatnonzero(here).tolist(), found, strict=True):
                row = rows[place]
                rows[place] = replace(row, questions=questions) if isinstance(row, Sample) else row
        yield replace(local, rows=tuple(rows))


def read_questions(manifest: Manifest, rows: Iterable[int]) -> Iterator[tuple[Question, ...]]:
    """The questions of manifest rows, in their order; none of a row that cannot be read."""
    for raw in read_rows(manifest, rows, head=HEAD):
        if isinstance(raw, RawSample):
            yield parse_questions(raw.meta, raw.id, f"{manifest.root}: sample {raw.key}")
        else:
            yield ()


def plain_answer(text: str) -> str:
    """An answer as a class: lower case, single spaces."""
    return " ".join(text.lower().split())


def frequent_answers(urls: Sequence[str], least: int, most: int) -> tuple[str, ...]:
    """The answers of data sets, the most frequent first: at least ``least`` times given, and at most ``most`` of them.

    Raises:
        DataError: no question of these data sets has an answer that counts.
    """
    counts: Counter[str] = Counter()
    for url in urls:
        manifest = Manifest.load(url)
        for questions in read_questions(manifest, range(len(manifest))):
            counts.update(plain_answer(answer) for question in questions for answer in question.answers)
    ranked = sorted((text for text, count in counts.items() if count >= least and text), key=lambda t: (-counts[t], t))
    if not ranked:
        raise DataError(
            f"{', '.join(urls)}: no answer is given {least} times.",
            "Training needs 'questions' with 'answers' in the samples' JSON; or lower method.least_answers.",
        )
    return tuple(ranked[:most])
