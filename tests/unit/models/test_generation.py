"""Search over token sequences, against every sequence there is: toy models of six tokens, decoder-only and T5."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from isthmus.compat import ensure_torchvision
from isthmus.config import LanguageConfig
from isthmus.models.language import LanguageModel
from isthmus.models.language_base import FrozenLanguage
from isthmus.models.seq2seq import Seq2SeqLanguageModel, untie_head

ensure_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration  # noqa: E402

V, EOS, LONGEST, BEAMS = 6, 1, 3, 30
SEEDS = range(8)


class Letters:
    """Ids as letters; the special ones too, so that a text names its sequence up to the end token."""

    bos_token_id, eos_token_id, pad_token_id = None, EOS, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ["abcdef".index(c) for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcdef"[i] for i in ids)


def toy(family: str, seed: int) -> FrozenLanguage:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": EOS}
        if family == "t5":
            published = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
            model = T5ForConditionalGeneration(
                T5Config(**shape, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, **published)
            )
            untie_head(model)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    **shape, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
                )
            )  # fmt: skip
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.5
    config = LanguageConfig(weights="toy")
    return Seq2SeqLanguageModel(model, Letters(), config) if family == "t5" else LanguageModel(model, Letters(), config)


def soft(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 2, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(language: FrozenLanguage, soft_1QL: Tensor, said: list[int]) -> Tensor:
    """Of the next token, by the model's own plain forward."""
    model = language.model.eval()
    if isinstance(language, Seq2SeqLanguageModel):
        end = language.embed(torch.tensor([[EOS]]))  # an empty prompt is its end token
        out = model(inputs_embeds=torch.cat([soft_1QL, end], 1), decoder_input_ids=torch.tensor([[0, *said]]))
        return out.logits[0, -1]
    words = language.embed(torch.tensor([said], dtype=torch.int64))
    return model(inputs_embeds=torch.cat([soft_1QL, words], 1)).logits[0, -1]


def every_sequence(language: FrozenLanguage, soft_1QL: Tensor) -> dict[tuple[int, ...], float]:
    """Log-probability of all sequences that end with the end token, or are LONGEST long."""
    open_, done = {(): 0.0}, {}
    for _ in range(LONGEST):
        longer = {}
        for said, total in open_.items():
            steps = logits(language, soft_1QL, list(said)).log_softmax(-1).tolist()
            for token, step in enumerate(steps):
                (done if token == EOS else longer)[(*said, token)] = total + step
        open_ = longer
    return done | open_


def best(found: dict[tuple[int, ...], float], penalty: float, shortest: int = 0) -> tuple[int, ...]:
    allowed = {s: p for s, p in found.items() if s[-1] != EOS or len(s) > shortest}
    return max(allowed, key=lambda s: allowed[s] / len(s) ** penalty)


def spelt(sequence: tuple[int, ...]) -> str:
    return Letters().decode(list(itertools.takewhile(lambda token: token != EOS, sequence)))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beam_search_finds_the_best_of_all_sequences(family: str) -> None:
    lengths = []
    for seed in SEEDS:
        language, soft_1QL = toy(family, seed), soft(seed)
        found = every_sequence(language, soft_1QL)
        assert sum(torch.tensor(list(found.values())).exp().tolist()) == pytest.approx(1.0, abs=1e-4)
        chosen = {}
        for penalty in (-1.0, 0.0, 1.0):
            chosen[penalty] = best(found, penalty)
            said = language.generate(soft_1QL, "", LONGEST, BEAMS, length_penalty=penalty)
            assert said == [spelt(chosen[penalty])], (seed, penalty)
            said = language.generate(soft_1QL, "", LONGEST, BEAMS, min_new_tokens=2, length_penalty=penalty)
            assert said == [spelt(best(found, penalty, shortest=2))], (seed, penalty)
        lengths.append([len(chosen[penalty]) for penalty in (-1.0, 0.0, 1.0)])
    assert all(row == sorted(row) for row in lengths), "a greater penalty divides long sums by more"
    assert any(row[0] < row[2] for row in lengths), "the toy cases tell the penalties apart"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_greedy_search_with_and_without_repetition_penalty(family: str) -> None:
    changed = 0
    for seed in SEEDS:
        language, soft_1QL = toy(family, seed), soft(seed)
        by_hand = {}
        for penalty in (1.0, 1.15, 4.0):
            said: list[int] = []
            while len(said) < 8 and EOS not in said:
                scores = logits(language, soft_1QL, said)
                for token in {*said, *([0] if family == "t5" else [])}:  # T5's start token counts as said
                    scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
                said.append(int(scores.argmax()))
            by_hand[penalty] = spelt(tuple(said))
            assert language.generate(soft_1QL, "", 8, repetition_penalty=penalty) == [by_hand[penalty]], (seed, penalty)
        assert language.generate(soft_1QL, "", 8) == [by_hand[1.0]], "no penalty unless it is asked for"
        changed += by_hand[1.0] != by_hand[4.0]
    assert changed >= 1, "the toy cases tell the penalties apart"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_of_any_length_do_not_disturb_one_another(family: str, beams: int) -> None:
    language, rows, prompts = toy(family, 3), soft(9, 4), ["", "c", "cdefcdef", "dd"]
    together = language.generate(rows, prompts, 6, beams)
    assert together == [language.generate(rows[i : i + 1], prompts[i], 6, beams)[0] for i in range(4)]
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_more_tokens_than_allowed(family: str) -> None:
    language = toy(family, 0)
    assert all(len(text) <= 2 for text in language.generate(soft(1, 5), "", max_new_tokens=2))
    assert all(len(text) == 5 for text in language.generate(soft(1, 5), "", max_new_tokens=5, min_new_tokens=5))
