"""Freezing by glob, digests, and the exact set of saved parameters."""

import pytest
import torch
from torch import nn

from isthmus.errors import ConfigError, WeightsError
from isthmus.models.freezing import freeze, load_trainable, state_digest, trainable_state, verdict_table


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"vision": nn.Linear(3, 4), "bridge": nn.Linear(4, 2)})


def test_a_verdict_for_every_parameter():
    module = make()
    verdict = freeze(module, ["vision.*"])
    assert verdict == {
        "vision.weight": "frozen", "vision.bias": "frozen", "bridge.weight": "trained", "bridge.bias": "trained",
    }  # fmt: skip
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {"bridge.weight", "bridge.bias"}
    assert freeze(module, []) == dict.fromkeys(verdict, "trained")


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"vison\.weight.*vision\.weight"):
        freeze(make(), ["vison.weight"])


def test_the_table_sums_up():
    module = make()
    freeze(module, ["vision.*"])
    lines = verdict_table(module, depth=1).splitlines()
    assert any(line.split() == ["vision", "frozen", "16"] for line in lines)
    assert lines[-2].split() == ["all", "trained", "10"]


def test_the_digest_sees_names_types_shapes_and_every_byte():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "s": torch.tensor(3)}
    digest = state_digest(state)
    assert digest == state_digest(dict(reversed(state.items())))
    assert digest == state_digest({**state, "a": state["a"].t().contiguous().t()}), "layout is no content"
    changed = state["a"].clone()
    changed[1, 2] += 1e-6
    others = [
        {**state, "a": changed},
        {**state, "a": state["a"].view(3, 2)},
        {**state, "b": state["b"].half()},
        {("c" if k == "a" else k): v for k, v in state.items()},
    ]
    assert len({digest, *map(state_digest, others)}) == 5


def test_tied_tensors_are_two_names_of_one_content():
    shared = torch.randn(4)
    assert state_digest({"a": shared, "b": shared}) == state_digest({"a": shared, "b": shared.clone()})


def test_trainable_parameters_round_trip_and_stay_apart_from_the_module():
    module, other = make(), make()
    for m in (module, other):
        freeze(m, ["vision.*"])
    state = trainable_state(module)
    with torch.no_grad():
        module["bridge"].weight.zero_()
        other["bridge"].weight.fill_(7.0)
    assert state["bridge.weight"].abs().sum() > 0, "the state is a copy"
    load_trainable(other, state)
    assert torch.equal(other["bridge"].weight, state["bridge.weight"])
    assert set(state) == {"bridge.weight", "bridge.bias"}


@pytest.mark.parametrize("change", ["missing", "surplus", "frozen", "shape"])
def test_any_other_set_is_refused_and_nothing_written(change):
    module = make()
    freeze(module, ["vision.*"])
    state = {name: torch.zeros_like(t) for name, t in trainable_state(module).items()}
    if change == "missing":
        del state["bridge.bias"]
    elif change == "surplus":
        state["bridge.extra"] = torch.zeros(1)
    elif change == "frozen":
        state["vision.bias"] = torch.zeros(4)
    else:
        state["bridge.bias"] = torch.zeros(3)
    before = state_digest(module)
    with pytest.raises(WeightsError):
        load_trainable(module, state)
    assert state_digest(module) == before
