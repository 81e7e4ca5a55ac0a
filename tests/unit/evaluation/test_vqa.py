"""VQA: the official normalisation with its quirks, leave-one-out accuracy, the prior, the question's form."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from isthmus.config import VqaConfig
from isthmus.errors import DataError
from isthmus.evaluation.layouts import Question
from isthmus.evaluation.vqa import accuracy, ask, clean_question, normalise, score_answers
from isthmus.evaluation.vqa_tables import CONTRACTIONS, MARKS

MIXED = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["pink"]


@pytest.mark.parametrize(
    ("answer", "worth"), [("grey", 0.0), ("pink", 0.3), ("green", 0.6), ("blue", 0.9), ("red", 1.0)]
)
def test_accuracy_by_matches(answer: str, worth: float) -> None:
    assert accuracy(answer, MIXED) == pytest.approx(worth)
    assert accuracy(answer, MIXED) == pytest.approx(by_definition(answer, MIXED))


def by_definition(answer: str, references: list[str]) -> float:
    """The mean over all subsets that leave one annotator out."""
    subsets = itertools.combinations(references, len(references) - 1)
    worth = [min(sum(text == answer for text in subset) / 3, 1.0) for subset in subsets]
    return sum(worth) / len(worth)


def test_accuracy_is_the_mean_over_subsets_on_random_answers() -> None:
    generator = random.Random(0)
    for _ in range(200):
        references = generator.choices(["cat", "dog", "cow", "fox"], k=10)
        if len(set(references)) > 1:
            assert accuracy("cat", references) == pytest.approx(by_definition("cat", references), abs=1e-12)


@pytest.mark.parametrize(
    ("raw", "official"),
    [
        ("2.", "2"),
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # digit, comma, digit: every mark is deleted, not only the comma
        ("t-shirt", "t shirt"),
        ("black- white", "black white"),
        ("black -white", "black white"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("The cat", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("don't", "don't"),
        ("somebody'd", "somebodyd"),  # one of the table's own mistakes
        ("Im", "im"),  # its capital keys never match
        ("whats that?", "what's that"),
        ("  yes\n", "yes"),
        ("a\tb", "b"),
        ("yes!", "yes"),
        ("what?!", "what"),
        (". " * 40, " ".join(["."] * 8)),  # at most 32 periods go
    ],
)
def test_normalisation(raw: str, official: str) -> None:
    assert normalise(raw) == official


def test_a_mark_is_judged_by_the_text_as_it_came() -> None:
    # Once '/' has become a space, a '-' stands beside one. Judged then, every "-" would be deleted: "q r xy".
    assert normalise("q/-r x-y") == "q r x y"
    assert normalise("q -r x-y") == "q r xy"


def test_the_table_is_the_official_one() -> None:
    assert len(CONTRACTIONS) == 120 and len(MARKS) == 21
    assert CONTRACTIONS["let's"] == "let's" and CONTRACTIONS["she's"] == "she's"
    assert CONTRACTIONS["ow's'at"] == "'ow's'at" and CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["youve"] == "you've" and "Id've" in CONTRACTIONS and "didn't" not in CONTRACTIONS
    odd = [key for key, value in CONTRACTIONS.items() if re.sub("'", "", key) != re.sub("'", "", value)]
    assert odd == []  # only apostrophes are ever added or, once, taken


def test_unanimous_references_are_compared_as_they_are() -> None:
    assert accuracy("yes", ["yes"] * 10) == 1.0
    assert accuracy("Yes", ["yes"] * 10) == accuracy("yes.", ["yes"] * 10) == 0.0
    assert accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert accuracy("two", ["2"] * 10) == 0.0 and accuracy("two", ["2"] * 9 + ["3"]) == 1.0
    assert accuracy(" the cat\n", ["the cat"] * 10) == 1.0  # white space goes in any case


def test_references_are_normalised_too() -> None:
    assert accuracy("t-shirt", ["t shirt"] * 5 + ["T-Shirt."] * 5) == 1.0
    assert accuracy("2", ["two"] * 2 + ["shoe"] * 8) == pytest.approx(0.6)


def question(number: int, answers: list[str], kind: str = "", answer_kind: str = "") -> Question:
    return Question(number, "what?", tuple(answers), kind, answer_kind)


def test_a_set_is_scored_by_type_beside_its_prior() -> None:
    asked = [
        question(1, ["yes"] * 6 + ["no"] * 4, "is the", "yes/no"),
        question(2, ["yes"] * 8 + ["no"] * 2, "is the", "yes/no"),
        question(3, ["two"] * 9 + ["3"], "how many", "number"),
    ]
    scores = score_answers(asked, ["no", "yes", "5"])
    assert scores.each == (1.0, 1.0, 0.0)
    assert scores.metrics["vqa_accuracy"] == pytest.approx(2 / 3)
    assert scores.metrics["vqa_accuracy_answer_type/yes_no"] == 1.0
    assert scores.metrics["vqa_accuracy_answer_type/number"] == 0.0
    assert scores.metrics["vqa_accuracy_type/how_many"] == 0.0
    assert scores.metrics["vqa_accuracy_prior"] == 1.0  # "yes" to the first type, "two" to the second
    assert "evaluated references" in scores.prior and scores.not_computed == ""
    trained = score_answers(asked, ["no", "yes", "5"], [question(9, ["no"] * 10, "is the")])
    assert trained.metrics["vqa_accuracy_prior"] == pytest.approx((1.0 + 0.6 + 0.0) / 3)
    assert "training answers" in trained.prior


def test_other_than_ten_references_have_no_official_accuracy() -> None:
    scores = score_answers([question(1, ["Red"]), question(2, ["blue", "two", "2"])], ["red.", "2"])
    assert scores.metrics["vqa_exact_match"] == 1.0 and "vqa_accuracy" not in scores.metrics
    assert "defined over 10" in scores.not_computed


def test_answers_and_questions_must_fit() -> None:
    with pytest.raises(DataError, match="1 answers to 2 questions"):
        score_answers([question(1, ["a"]), question(2, ["b"])], ["a"])
    with pytest.raises(DataError, match=r"no reference answer \(first 2\)"):
        score_answers([question(1, ["a"]), question(2, [])], ["a", "b"])


def test_the_question_is_cleaned_as_in_training() -> None:
    assert clean_question('What\'s on T.V. (the "set")? ') == "what's on tv the set?"
    assert clean_question(" ".join(map(str, range(60)))) == " ".join(map(str, range(50)))
    assert ask("Is it RED?", VqaConfig()) == "Question: is it red? Short answer:"
    assert ask("Is it RED {}?", VqaConfig(prompt="Q: {} A:", clean=False)) == "Q: Is it RED {}? A:"


@pytest.mark.parametrize("prompt", ["no place", "{} two {}"])
def test_a_prompt_has_one_place(prompt: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        VqaConfig(prompt=prompt)
