"""Adaptive weights: their formulas, their limits, and a state that goes on exactly."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.contracts import LocalComm
from isthmus.losses.weighting import LIMIT, DynamicAverage, Uncertainty, dynamic_weights


def test_uncertainty_is_the_published_sum() -> None:
    module = Uncertainty(2)
    with torch.no_grad():
        module.log_variance.copy_(torch.tensor([0.4, -1.0]))
    total, weights = module([torch.tensor(3.0), torch.tensor(0.2)])
    expected = 0.5 * math.exp(-0.4) * 3 + 0.2 + 0.5 * math.exp(1.0) * 0.2 - 0.5
    assert float(total) == pytest.approx(expected)
    assert weights.tolist() == pytest.approx([0.5 * math.exp(-0.4), 0.5 * math.exp(1.0)])


def test_a_loss_that_vanishes_gains_no_weight_without_end() -> None:
    module = Uncertainty(2)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(200):
        total, weights = module([torch.tensor(1.0), torch.tensor(0.0)])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert float(weights[1]) == pytest.approx(math.exp(LIMIT) / 2)
    assert float(module.log_variance[1]) < -LIMIT  # a plain loop leaves the parameter free; the value is held
    assert float(weights[0]) == pytest.approx(0.5, abs=1e-3)  # e^-s L = 1 at the least
    module([torch.tensor(1.0), torch.tensor(900.0)])[0].backward()
    assert module.log_variance.grad[1] < 0  # there is a way back


def test_dynamic_average_is_the_published_formula() -> None:
    rates = [0.5 / 1.0, 3.0 / 2.0]
    powers = [math.exp(r / 2) for r in rates]
    expected = [2 * p / sum(powers) for p in powers]
    assert dynamic_weights([1.0, 2.0], [0.5, 3.0], 2.0) == pytest.approx(expected)
    assert dynamic_weights([0.0, 1.0], [1.0, 1.0], 1e-3) == [2.0, 0.0], "no overflow"
    average = DynamicAverage(2, 2.0)
    history = {0: [(0.8, 1.0), (1.2, 3.0)], 1: [(0.5, 3.0)], 2: [(9.0, 9.0)]}
    found, step = {}, 0
    for epoch, rows in history.items():
        for row in rows:
            found[epoch] = average.weights(step, epoch)
            average.add([torch.tensor(value) for value in row], LocalComm())
            step += 1
    assert found[0] == found[1] == [1.0, 1.0]
    assert found[2] == pytest.approx(expected, rel=1e-6) and sum(found[2]) == pytest.approx(2)


def test_an_epoch_may_be_so_many_steps() -> None:
    average = DynamicAverage(2, 2.0, period=3)
    weights = []
    for step in range(9):
        weights.append(average.weights(step, 0))
        average.add([torch.tensor(2.0 ** -(step // 3)), torch.tensor(1.0)], LocalComm())
    assert weights[:6] == [[1.0, 1.0]] * 6
    assert weights[6] == weights[8] == pytest.approx(dynamic_weights([1.0, 1.0], [0.5, 1.0], 2.0))


@pytest.mark.parametrize("stop", [1, 4, 6, 8])
def test_the_state_goes_on_bit_by_bit(stop: int) -> None:
    def run(average: DynamicAverage, steps: range) -> list[list[float]]:
        out = []
        for step in steps:
            out.append(average.weights(step, step // 3))
            average.add([torch.tensor(1 / (step + 3)), torch.rand((), generator=random[step])], LocalComm())
        return out

    random = [torch.Generator().manual_seed(step) for step in range(12)]
    calm = run(DynamicAverage(2, 2.0), range(12))
    random = [torch.Generator().manual_seed(step) for step in range(12)]
    first, second = DynamicAverage(2, 2.0), DynamicAverage(2, 2.0)
    before = run(first, range(stop))
    second.load(first.state())
    assert before + run(second, range(stop, 12)) == calm
