"""Masked words: how many, what stands in their place, and that a draw knows only its own row."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.contracts import LocalComm
from isthmus.losses.language import IGNORED
from isthmus.losses.masked import mask_tokens, masked_count, masked_sum

VOCAB, MASK = 1000, 4


def masked(rows: int, first: int = 0, step: int = 0):
    ids = torch.arange(10, 30).expand(rows, -1).clone()
    words = torch.ones_like(ids, dtype=torch.bool)
    words[:, [0, -1]] = False
    return ids, mask_tokens(ids, words, MASK, VOCAB, seed=1, step=step, first_row=first)


def test_fifteen_in_a_hundred_words_are_asked_for_and_most_are_hidden() -> None:
    ids, found = masked(4000)
    asked = found.labels_BT != IGNORED
    count = int(asked.sum())
    assert count / (4000 * 18) == pytest.approx(0.15, abs=0.005)
    assert not asked[:, [0, -1]].any(), "special tokens are never asked for"
    assert torch.equal(found.labels_BT[asked], ids[asked]) and torch.equal(found.ids_BT[~asked], ids[~asked])
    shares = [
        (found.ids_BT[asked] == MASK).float().mean(),
        (found.ids_BT[asked] == ids[asked]).float().mean(),
    ]
    assert [float(s) for s in shares] == pytest.approx([0.8, 0.1], abs=0.01)
    others = found.ids_BT[asked & (found.ids_BT != MASK) & (found.ids_BT != ids)]
    assert len(set(others.tolist())) > 300 and int(others.max()) < VOCAB


def test_a_row_draws_the_same_on_any_rank_and_anew_at_every_step() -> None:
    _, whole = masked(8)
    _, second = masked(4, first=4)
    assert torch.equal(whole.ids_BT[4:], second.ids_BT) and torch.equal(whole.labels_BT[4:], second.labels_BT)
    assert not torch.equal(masked(8, step=1)[1].labels_BT, whole.labels_BT)


def test_the_mean_over_what_is_asked() -> None:
    labels = torch.full((2, 3), IGNORED)
    labels[0, 1], labels[1, 2] = 2, 0
    hidden = torch.randn(2, 3, 5)
    flat = masked_sum(hidden, labels, lambda x: torch.zeros(len(x), 7)) / masked_count(labels, LocalComm())
    assert float(flat) == pytest.approx(math.log(7))
    head = torch.nn.Linear(5, 7)
    nothing = masked_sum(hidden.requires_grad_(), torch.full((2, 3), IGNORED), head)
    nothing.backward()
    assert float(nothing) == 0.0 and not head.weight.grad.any(), "a rank without a masked word still calls its head"
