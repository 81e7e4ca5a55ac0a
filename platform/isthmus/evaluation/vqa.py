"""Visual question answering: how a question is asked, and the official accuracy of an answer (Antol et al., 2015).

An answer counts by the annotators who gave it: the mean over all ways to leave one of the ten out of
min(matches / 3, 1). So 0, 1, 2, 3 and 4 matches are worth 0, 0.3, 0.6, 0.9 and 1. The normalisation follows the
official program to its mistakes (:mod:`isthmus.evaluation.vqa_tables` and the notes below), which published figures
contain.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.config import VqaConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts import Question
from isthmus.evaluation.vqa_tables import ARTICLES, CONTRACTIONS, MARKS, NUMBERS

ANNOTATORS = 10

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The program hands a flag to where ``re.sub`` takes a count: later periods stay."""
_QUESTION_MARKS = re.compile(r"[.!\"()*#:;~]")
_QUESTION_WORDS = 50


def ask(question: str, config: VqaConfig) -> str:
    """The prompt of a question."""
    return config.prompt.replace("{}", clean_question(question) if config.clean else question.strip())


def clean_question(question: str) -> str:
    """Lower case, without ``. ! " ( ) * # : ; ~`` (removed, not replaced), at most 50 words (LAVIS)."""
    text = _QUESTION_MARKS.sub("", question.lower()).rstrip(" ")
    words = text.split(" ")
    return " ".join(words[:_QUESTION_WORDS]) if len(words) > _QUESTION_WORDS else text


def plain(answer: str) -> str:
    """Newlines and tabs to spaces, stripped: all that happens to answers the annotators agree on."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """The official form of an answer: punctuation, then number words, articles and contractions."""
    return _words(_punctuation(plain(answer)))


def accuracy(answer: str, references: Sequence[str]) -> float:
    """The official accuracy of one answer against the annotators' answers.

    References that all agree are compared as they are, the answer unprocessed too ("Yes" is not "yes" there).

    Args:
        answer: what the model said.
        references: one per annotator; each counts as an annotator of its own.
    """
    given, wanted = plain(answer), [plain(text) for text in references]
    if len(set(wanted)) > 1:
        given, wanted = _words(_punctuation(given)), [_words(_punctuation(text)) for text in wanted]
    matches = [text == given for text in wanted]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


@dataclass(frozen=True)
class VqaScores:
    """Figures of a set of answers.

    Attributes:
        metrics: accuracies, fractions of 1.
        each: per question, in their order; the official accuracy, or 1 and 0 for a match where there are not ten
            answers.
        not_computed: why the official accuracy is missing, "" where it is there.
        prior: where the prior's answers come from.
    """

    metrics: dict[str, float]
    each: tuple[float, ...]
    not_computed: str
    prior: str


def score_answers(
    questions: Sequence[Question], answers: Sequence[str], training: Sequence[Question] = ()
) -> VqaScores:
    """Accuracy over a set, by answer type and by question type, beside what an answerer that sees no image reaches.

    The prior's answer is the most frequent one of the question's type among ``training``, else among the references
    that are scored (which flatters the prior).

    Raises:
        DataError: numbers differ, or a question has no reference.
    """
    if len(questions) != len(answers) or not questions:
        raise DataError(f"There are {len(answers)} answers to {len(questions)} questions.", "Answer every question.")
    if bare := [q.id for q in questions if not q.answers]:
        raise DataError(f"{len(bare)} questions have no reference answer (first {bare[0]}).", "Give 'annotations'.")
    official = all(len(q.answers) == ANNOTATORS for q in questions)
    score = accuracy if official else _exact
    name = "vqa_accuracy" if official else "vqa_exact_match"
    each = [score(answer, q.answers) for q, answer in zip(questions, answers, strict=True)]
    guess = _Prior(training or questions)
    blind = [score(guess(q), q.answers) for q in questions]
    metrics = {name: _mean(each), f"{name}_prior": _mean(blind)}
    for what, kinds in (("answer_type", [q.answer_kind for q in questions]), ("type", [q.kind for q in questions])):
        for kind, values in sorted(_by(kinds, each).items()):
            if kind:
                metrics[f"{name}_{what}/{_key(kind)}"] = _mean(values)
    few = min(len(q.answers) for q in questions)
    reason = f"questions have from {few} answers, and the official accuracy is defined over {ANNOTATORS}"
    source = "training answers" if training else "the evaluated references themselves, which flatters it"
    among = "of the question's type" if any(q.kind for q in questions) else "of all questions (no types are named)"
    return VqaScores(metrics, tuple(each), "" if official else reason, f"most frequent answer {among}, of {source}")


class _Prior:
    """The most frequent answer by question type; of all types where a type is unknown."""

    def __init__(self, questions: Sequence[Question]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            counts[question.kind].update(plain(text) for text in question.answers)
        everything: Counter[str] = sum(counts.values(), Counter())
        self._best = {kind: _most(count) for kind, count in counts.items()}
        self._any = _most(everything)

    def __call__(self, question: Question) -> str:
        return self._best.get(question.kind, self._any)


def _key(kind: str) -> str:
    """A name that trackers take: "what color is the" -> what_color_is_the, "yes/no" -> yes_no."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def _most(count: Counter[str]) -> str:
    return min(count, key=lambda text: (-count[text], text)) if count else ""


def _exact(answer: str, references: Sequence[str]) -> float:
    """Whether the normalised answer is the annotators' most frequent one."""
    return float(normalise(answer) == _most(Counter(normalise(text) for text in references)))


def _by(kinds: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = defaultdict(list)
    for kind, value in zip(kinds, values, strict=True):
        out[kind].append(value)
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _punctuation(text: str) -> str:
    """Marks are deleted beside a space, and everywhere in a text with digit, comma, digit; else they become a space.

    Whether a mark stands beside a space is asked of the text as it came, also after other marks have gone.
    """
    out, numeric = text, _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if numeric or beside else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
