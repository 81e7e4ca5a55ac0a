"""The small language model: it must let what it writes depend on what stands before, or no soft prompt reaches it."""

from __future__ import annotations

from pathlib import Path

import torch

from isthmus.models.language import build_language
from isthmus.testing.words import trained_lm, word_tokenizer

COLOURS = ("red", "green", "blue", "black")
DOCUMENTS = [[f"a {colour} ball", f"it is {colour}", f"look a {colour} thing"] for colour in COLOURS]


def test_the_trained_model_repeats_what_its_document_is_about(tmp_path: Path) -> None:
    config, loss = trained_lm(tmp_path / "lm", DOCUMENTS, steps=150, batch=16, layers=2, width=32, sentences=3)
    language = build_language(config)
    assert 0 < loss < 0.7
    for colour in COLOURS:
        ids = torch.tensor([[*language.tokenizer(f"a {colour} ball")["input_ids"], language.end_id]])
        assert language.generate(language.embed(ids), prompt="it is", max_new_tokens=4) == [colour]
    again, same = trained_lm(tmp_path / "again", DOCUMENTS, steps=150, batch=16, layers=2, width=32, sentences=3)
    assert same == loss and build_language(again).base.digest == language.base.digest


def test_the_word_tokenizer_knows_each_word_whole() -> None:
    tokenizer = word_tokenizer(["two purple crosses", "at the top"])
    ids = tokenizer("at the purple crosses")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "at", "the", "purple", "crosses", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "at the purple crosses"
