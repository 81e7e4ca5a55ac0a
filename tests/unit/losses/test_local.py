"""Token contrast: closed forms, chunks equal to the whole, what is no word, and pairs judged singly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from isthmus.contracts import LocalComm
from isthmus.losses.local import (
    local_contrast,
    pair_similarity,
    relation,
    tokens_to_words,
    words_to_tokens,
)
from isthmus.models.relations import RelationalHead, attended

B, K, T, E = 5, 4, 6, 8
TEMPERATURE = torch.tensor([0.1])


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(B, n, E, generator=generator), dim=-1) for n in (K, T))
    words = torch.arange(T) < torch.tensor([[2], [6], [1], [4], [3]])
    words[:, 0] = False  # [CLS]
    words[2, 1] = True
    return image, text, words


def written_out(image: torch.Tensor, text: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both similarities by loops over pairs."""
    i2t, t2i = torch.zeros(B, B), torch.zeros(B, B)
    for i in range(B):
        for j in range(B):
            sims = image[i] @ text[j][words[j]].T
            i2t[i, j], t2i[j, i] = sims.amax(1).mean(), sims.amax(0).mean()
    return i2t, t2i


def test_similarities_are_means_of_best_partners() -> None:
    image, text, words = drawn()
    i2t, t2i = written_out(image, text, words)
    torch.testing.assert_close(tokens_to_words(image, text, words), i2t)
    torch.testing.assert_close(words_to_tokens(text, words, image), t2i)
    torch.testing.assert_close(pair_similarity(image, text, words), (i2t.diagonal() + t2i.diagonal()) / 2)


def test_padding_and_special_tokens_have_no_say() -> None:
    image, text, words = drawn()
    elsewhere = torch.where(words.unsqueeze(2), text, F.normalize(torch.randn_like(text), dim=-1))
    for similarity in (tokens_to_words, lambda i, t, w: words_to_tokens(t, w, i), pair_similarity):
        assert torch.equal(similarity(image, text, words), similarity(image, elsewhere, words))
    none = torch.zeros_like(words)
    assert not tokens_to_words(image, text, none).any() and not words_to_tokens(text, none, image).any()


def loss_and_gradients(chunk: int | None, full: bool) -> list[torch.Tensor]:
    image, text, words = drawn()
    image.requires_grad_()
    text.requires_grad_()
    valid = torch.tensor([True, True, False, True, True])
    found = local_contrast(image, text, words, TEMPERATURE, valid, LocalComm(), full_gradient=full, chunk=chunk)
    found.loss.backward()
    return [found.loss.detach(), image.grad, text.grad]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("chunk", [1, 2 * B * K * T, 10**9])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk: int, full: bool, monkeypatch: Any) -> None:
    whole = loss_and_gradients(None, full)
    for ours, theirs in zip(loss_and_gradients(chunk, full), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_it_is_the_cross_entropy_both_ways_and_padding_rows_do_not_count() -> None:
    image, text, words = drawn()
    valid = torch.tensor([True, True, False, True, True])
    i2t, t2i = written_out(image, text, words)
    rows, target = valid.nonzero().squeeze(1), torch.arange(4)
    wanted = sum(F.cross_entropy(s[rows][:, rows] / 0.1, target) for s in (i2t, t2i)) / 2
    found = local_contrast(image, text, words, TEMPERATURE, valid, LocalComm())
    torch.testing.assert_close(found.loss, wanted)
    same = local_contrast(image[:1].expand(B, -1, -1), text[:1].expand(B, -1, -1), words[:1].expand(B, -1),
                          TEMPERATURE, torch.ones(B, dtype=torch.bool), LocalComm())  # fmt: skip
    assert float(same.loss) == pytest.approx(math.log(B), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- relation


def test_relation_starts_near_ln_2_and_counts_only_what_counts() -> None:
    counted = torch.tensor([True, True, False, True, True])
    assert float(relation(torch.zeros(3, B), counted, LocalComm()).loss) == pytest.approx(math.log(2))
    logits = torch.full((3, B), -20.0)
    logits[0] = 20.0
    logits[:, 2] = torch.tensor([-50.0, 50.0, 50.0])
    found = relation(logits, counted, LocalComm())
    assert float(found.loss) < 1e-6 and {k: float(v) for k, v in found.accuracy.items()} == {
        "positive": 1.0, "negative": 1.0,
    }  # fmt: skip


def test_a_word_s_context_is_the_token_that_it_fits() -> None:
    image = torch.eye(E)[:K].unsqueeze(0)
    text, words = torch.eye(E)[[2, 0, 7]].unsqueeze(0), torch.tensor([[True, True, False]])
    context = attended(image, text, words, 9.0)
    assert context[0, 0].argmax() == 2 and context[0, 1].argmax() == 0
    torch.testing.assert_close(context.norm(dim=-1), torch.ones(1, 3))


def test_the_relational_head_sees_words_alone_and_in_any_order() -> None:
    torch.manual_seed(0)
    head = RelationalHead(E, 16, 3, 9.0)
    image, text, words = drawn()
    logits = head(image, text, words)
    elsewhere = torch.where(words.unsqueeze(2), text, torch.randn_like(text))
    torch.testing.assert_close(head(image, elsewhere, words), logits)
    order = torch.randperm(T)
    torch.testing.assert_close(head(image[:, torch.randperm(K)], text[:, order], words[:, order]), logits)
    assert not torch.allclose(head(image.roll(1, 0), text, words), logits, atol=1e-4)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
