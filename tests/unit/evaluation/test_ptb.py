"""The tokenizer against recorded answers of Stanford's, and against the program itself where Java is there."""

from __future__ import annotations

import random
import shutil

import pytest

from isthmus.evaluation.ptb import DROPPED, tokenize

# caption -> what PTBTokenizer 3.4.1 with the scorers' punctuation filter gives
RECORDED = {
    "A man's dog doesn't like it; they're e-mailing 3.5 cats, isn't it?": "a man 's dog does n't like it they 're "
    "e-mailing 3.5 cats is n't it",
    "The \"big\" red-and-white sign says 'STOP!' (really) [ok] {no}": "the big red-and-white sign says stop -lrb- "
    "really -rrb- -lsb- ok -rsb- -lcb- no -rcb-",
    "U.S. flag on Mr. Smith's house at 10:30 a.m. for $5.00 or 50% off": "u.s. flag on mr. smith 's house at 10:30 "
    "a.m. for $ 5.00 or 50 % off",
    "two dogs & a cat... running -- fast! what?! no way!!! yes?? ok....": "two dogs & a cat running fast what ?! no "
    "way !!! yes ?? ok",
    "I'm I've we'll she'd can't won't couldn't've": "i 'm i 've we 'll she 'd ca n't wo n't could n't 've",
    "cannot gonna wanna gimme lemme gotta 'tis": "can not gon na wan na gim me lem me got ta 't is",
    "\u201ccurly\u201d \u2018single\u2019 don\u2019t \u2013 dash \u2014 em\u2026": "curly single do n't dash em",
    "A caf\u00e9 with na\u00efve se\u00f1or, 1,000 people": "a caf\u00e9 with na\u00efve se\u00f1or 1,000 people",
    "plan B. is vitamin c. at the end of a no.": "plan b. is vitamin c. at the end of a no",
    "the no. 1 team at St. Paul's church, Main St. and 5th Ave.": "the no. 1 team at st. paul 's church main st. and "
    "5th ave.",
    "man: light skin tone, beard": "man light skin tone beard",
    "flag: C\u00f4te d'Ivoire": "flag c\u00f4te d'ivoire",
    "sits on a bench.a dog and/or cat 24/7": "sits on a bench.a dog and/or cat 24/7",
    "hello,world(with hat)and x;y": "hello world -lrb- with hat -rrb- and x y",
    "a dogs' life 'cause they're lovin' it o'clock": "a dogs life 'cause they 're lovin it o'clock",
    "the '90s, the 1990's and 80's": "the '90s the 1990 's and 80 's",
    "rock 'n' roll and R&B": "rock 'n' roll and r&b",
    "joy \U0001f602 here": "joy here",
    "": "",
}

SUBJECTS = ["a man", "Two women", "the dog's owner", "A boy and his sister", "An old, rusty truck", "Mr. Jones"]
VERBS = ["is riding", "isn't holding", "sits on", "can't see", "are looking at", "doesn't eat", "who's painting"]
OBJECTS = ['a "stop" sign', "the U.S. flag", "a red-and-white cow", "3 apples (green)", "his/her bike", "the 2nd cake"]
ENDS = [".", "!", "", " at 10:30 a.m.", ", it's raining.", "; they're wet", " -- alone...", " in the snow ."]


@pytest.mark.parametrize("caption", RECORDED)
def test_recorded_answers(caption: str) -> None:
    assert tokenize(caption) == RECORDED[caption]


def test_tokenising_twice_changes_nothing_on_plain_text() -> None:
    once = tokenize("A small dog is running on the green grass with a ball.")
    assert once == tokenize(once) == "a small dog is running on the green grass with a ball"


def test_no_dropped_token_survives() -> None:
    for caption in RECORDED:
        assert not DROPPED & set(tokenize(caption).split())


@pytest.mark.skipif(not shutil.which("java"), reason="the original is a Java program")
def test_agrees_with_the_original_on_ordinary_captions() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    generator = random.Random(0)
    captions = [
        f"{generator.choice(SUBJECTS)} {generator.choice(VERBS)} {generator.choice(OBJECTS)}{generator.choice(ENDS)}"
        for _ in range(200)
    ] + [text for text in RECORDED if text and "joy" not in text]
    original = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(captions)})
    assert {n: [tokenize(text)] for n, text in enumerate(captions)} == original
