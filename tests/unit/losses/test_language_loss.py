"""Next-token cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from isthmus.contracts import LocalComm
from isthmus.losses.language import IGNORED, language_reference, next_token_count, next_token_sum


def next_token_loss(hidden, labels, head, comm, *, smoothing=0.0, mean="global"):
    """The mean that methods make of the two."""
    return next_token_sum(hidden, labels, head, smoothing=smoothing) / next_token_count(labels, comm, mean)


def test_label_t_plus_1_is_asked_of_position_t() -> None:
    hidden, labels = torch.randn(2, 5, 7), torch.tensor([[6, 1, 2, 3, 4], [6, 5, 0, IGNORED, IGNORED]])
    expected = F.cross_entropy(hidden[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), label_smoothing=0.1)
    found = next_token_loss(hidden, labels, lambda x: x, LocalComm(), smoothing=0.1)
    torch.testing.assert_close(found, expected)


def test_logits_are_made_only_where_there_is_a_target() -> None:
    asked = []
    labels = torch.tensor([[6, 1, 2, 3, 4], [6, 5, 0, IGNORED, IGNORED]])
    next_token_loss(torch.randn(2, 5, 7), labels, lambda x: asked.append(len(x)) or x, LocalComm())
    assert asked == [6]


def test_closed_forms() -> None:
    labels = torch.tensor([[0, 3, 2]])
    assert float(next_token_loss(torch.zeros(1, 3, 9), labels, lambda x: x, LocalComm())) == pytest.approx(math.log(9))
    right = F.one_hot(torch.tensor([[3, 2, 0]]), 9) * 100.0
    assert float(next_token_loss(right, labels, lambda x: x, LocalComm())) == pytest.approx(0.0, abs=1e-6)
    assert language_reference(30523, 0.1).floor == pytest.approx(1.3577, abs=1e-4)
    assert language_reference(30523).chance == pytest.approx(10.326, abs=1e-3)


def test_smoothing_leaves_its_floor_and_nothing_lower() -> None:
    labels = torch.tensor([[0, 3, 2]])
    best = torch.log(F.one_hot(torch.tensor([[3, 2, 0]]), 9) * 0.9 + 0.1 / 9)  # the smoothed target itself
    found = next_token_loss(best, labels, lambda x: x, LocalComm(), smoothing=0.1)
    assert float(found) == pytest.approx(language_reference(9, 0.1).floor, abs=1e-6)


def test_a_batch_without_targets_is_zero_and_keeps_the_head_in_the_graph() -> None:
    head = torch.nn.Linear(4, 9)
    loss = next_token_loss(torch.randn(2, 3, 4), torch.full((2, 3), IGNORED), head, LocalComm())
    loss.backward()
    assert float(loss) == 0.0 and torch.equal(head.weight.grad, torch.zeros(9, 4))
