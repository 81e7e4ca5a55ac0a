"""Parameter groups and the learning rate against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from isthmus.config import TrainConfig
from isthmus.errors import ConfigError
from isthmus.training.optimizer import adamw, learning_rate, parameter_groups


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 4, 8))
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.temperature = nn.Parameter(torch.tensor([0.07]))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_one_dimensional_parameters_and_biases_are_not_decayed_and_frozen_ones_are_left_out() -> None:
    toy = Toy()
    names = {id(p): n for n, p in toy.named_parameters()}
    decay, plain = parameter_groups(toy, 0.05)
    assert {names[id(p)] for p in decay["params"]} == {"queries", "linear.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"linear.bias", "norm.weight", "norm.bias", "temperature"}
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_no_empty_group_is_handed_to_the_optimizer() -> None:
    assert [g["name"] for g in parameter_groups(nn.LayerNorm(4), 0.05)] == ["no_decay"]


def test_an_epsilon_above_the_rounding_of_gradients_keeps_adam_from_whole_steps() -> None:
    moved = {}
    for eps in (1e-8, 1e-6):
        toy = Toy()
        train = TrainConfig(steps=1, lr=0.5, weight_decay=0.0, betas=(0.8, 0.9), eps=eps)
        optimizer = adamw(toy, train, fused=False)
        toy.queries.grad = torch.full_like(toy.queries, 1e-9)
        optimizer.step()
        assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
        moved[eps] = float(toy.queries.detach().abs().max())
    assert moved == pytest.approx({1e-8: 0.5 * 1e-9 / 1.1e-8, 1e-6: 0.5 * 1e-9 / 1.001e-6}, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": 0.0}])
def test_moments_that_adam_cannot_keep_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrainConfig(steps=1, **wrong)


def test_a_part_of_the_model_may_learn_more_slowly() -> None:
    toy = Toy()
    names = {id(p): n for n, p in toy.named_parameters()}
    groups = parameter_groups(toy, 0.05, {"linear": 0.1, "linear.bias": 0.5})
    scale = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scale == {
        "queries": 1.0,
        "linear.weight": 0.1,
        "linear.bias": 0.5,
        "norm.weight": 1.0,
        "norm.bias": 1.0,
        "temperature": 1.0,
    }
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decay": 0.05,
        "no_decay": 0.0,
        "linear.decay": 0.05,
        "linear.bias.no_decay": 0.0,
    }


@pytest.mark.parametrize("prefix", ["linea", "frozen"])
def test_a_factor_for_nothing_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match=f"train.lr_scale names '{prefix}'"):
        parameter_groups(Toy(), 0.05, {prefix: 0.1})


def test_warm_up_is_linear_and_the_cosine_ends_at_the_least_rate() -> None:
    train = TrainConfig(steps=21, lr=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(0, train) == pytest.approx(0.1)
    assert learning_rate(4, train) == pytest.approx(0.5)
    assert learning_rate(10, train) == pytest.approx(1.0)
    assert learning_rate(15, train) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(20, train) == pytest.approx(0.1)
    rates = [learning_rate(step, train) for step in range(10, 21)]
    assert rates == sorted(rates, reverse=True)


def test_a_single_step_after_the_warm_up_has_the_full_rate() -> None:
    assert learning_rate(0, TrainConfig(steps=1, lr=0.5)) == 0.5
