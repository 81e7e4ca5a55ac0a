"""Hard negatives and the matching loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isthmus.contracts import LocalComm
from isthmus.losses.counting import uniform
from isthmus.losses.matching import PRIOR_ENTROPY, draw, matching, mine_negatives, negative_weights


def logits(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2


def test_a_positive_is_never_drawn() -> None:
    ids = torch.tensor([1, 2, 1, 3, 3, 4])
    forbidden = ids.unsqueeze(0) == ids.unsqueeze(1)
    valid = torch.ones(6, dtype=torch.bool)
    sims = logits(6, 6) + forbidden * 50.0  # positives would win every draw
    for step in range(300):
        found = mine_negatives(sims, sims.T, forbidden, valid, LocalComm(), seed=3, step=step)
        for index in (found.image_B, found.text_B):
            assert not forbidden[torch.arange(6), index].any()
        assert found.counted_B.all()


def test_draws_follow_the_softmax_weights() -> None:
    weights = negative_weights(logits(1, 5), torch.tensor([[False, True, False, False, False]]))
    n = 4000
    counts = np.zeros(5)
    for step in range(n):
        counts[int(draw(weights, 0, step, 0, 0))] += 1
    expected = weights[0].numpy() * n
    assert counts[1] == 0
    kept = expected > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi2 < 16.3  # three degrees of freedom, 0.1 %; the draw is deterministic, so this does not flicker


def test_a_row_draws_the_same_wherever_it_is() -> None:
    sims, forbidden = logits(8, 8), torch.eye(8, dtype=torch.bool)
    weights = negative_weights(sims, forbidden)
    whole = draw(weights, 5, 11, 0, 1)
    halves = torch.cat([draw(weights[:4], 5, 11, 0, 1), draw(weights[4:], 5, 11, 4, 1)])
    assert torch.equal(whole, halves)
    others = [draw(weights, *key) for key in ((6, 11, 0, 1), (5, 12, 0, 1), (5, 11, 0, 0))]
    assert all(not torch.equal(whole, other) for other in others)


def test_one_candidate_alone_counts_nothing() -> None:
    """N = 1: the only candidate is the positive itself. It must be skipped, not matched against itself."""
    own = torch.ones(1, 1, dtype=torch.bool)
    found = mine_negatives(torch.zeros(1, 1), torch.zeros(1, 1), own, own[0], LocalComm(), seed=0, step=0)
    assert not found.counted_B.any()
    scores = torch.randn(3, 1, 2, requires_grad=True)
    match = matching(scores, found.counted_B, LocalComm())
    match.loss.backward()
    assert float(match.loss) == 0.0 and torch.equal(scores.grad, torch.zeros_like(scores))


def test_padding_is_never_a_negative() -> None:
    valid = torch.tensor([True, True, True, False])
    forbidden = torch.eye(4, dtype=torch.bool) | ~valid
    for step in range(100):
        found = mine_negatives(logits(4, 4), logits(4, 4, 1), forbidden, valid, LocalComm(), seed=0, step=step)
        assert found.counted_B.tolist() == [True, True, True, False]
        assert int(found.image_B[:3].max()) < 3 and int(found.text_B[:3].max()) < 3


def test_closed_forms_of_the_loss() -> None:
    counted = torch.ones(4, dtype=torch.bool)
    assert float(matching(torch.zeros(3, 4, 2), counted, LocalComm()).loss) == pytest.approx(math.log(2))
    prior = torch.tensor([2 / 3, 1 / 3]).log().expand(3, 4, 2)
    match = matching(prior, counted, LocalComm())
    assert float(match.loss) == pytest.approx(PRIOR_ENTROPY)
    assert [float(v) for v in match.accuracy.values()] == [0.0, 1.0, 1.0]
    right = torch.zeros(3, 4, 2)
    right[0, :, 1] = right[1:, :, 0] = 100.0
    assert float(matching(right, counted, LocalComm()).loss) == pytest.approx(0.0)


def test_uniform_is_uniform_and_pure() -> None:
    rows = np.arange(20_000)
    u = uniform(1, 2, rows, 3)
    assert np.array_equal(u[100:200], uniform(1, 2, rows[100:200], 3)) and u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert float(uniform(-1, -5)) != float(uniform(1, 5))
