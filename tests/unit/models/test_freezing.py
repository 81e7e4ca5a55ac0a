"""Freezing by glob, digests, and the exact set of saved parameters."""

import pytest
import torch
from torch import nn

from isthmus.contracts import Base
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.freezing import freeze, freeze_all, load_owned, owned_state, state_digest, verdict_of, verdict_table


class Backbone(nn.Linear):
    base = Base("vision", "random", "0" * 64)


def make() -> nn.Module:
    """A frozen backbone, two parts that training owns."""
    torch.manual_seed(0)
    backbone = Backbone(3, 4)
    freeze_all(backbone)
    return nn.ModuleDict({"vision": backbone, "bridge": nn.Linear(4, 2), "words": nn.Embedding(5, 2)})


def test_globs_freeze_what_they_match_and_nothing_else():
    module = make()
    freeze(module, ["words.*"])
    assert verdict_of(module) == {
        "vision.weight": "frozen", "vision.bias": "frozen", "bridge.weight": "trained", "bridge.bias": "trained",
        "words.weight": "frozen",
    }  # fmt: skip


@pytest.mark.parametrize("glob", ["bridg.weight", "vision.*"])
def test_a_glob_that_matches_nothing_of_ours_is_refused(glob):
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(make(), [glob])


def test_something_must_be_left_to_train():
    with pytest.raises(ConfigError, match="leave nothing to train"):
        freeze(make(), ["bridge.*", "words.*"])


def test_the_table_sums_up():
    module = make()
    freeze(module, ["words.*"])
    lines = verdict_table(module, depth=1).splitlines()
    assert any(line.split() == ["vision", "frozen", "16"] for line in lines)
    assert lines[-2].split() == ["all", "trained", "10"] and lines[-1].split() == ["all", "frozen", "26"]


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


def test_owned_parameters_round_trip_and_stay_apart_from_the_module():
    module, other = make(), make()
    freeze(module, ["words.*"])
    state = owned_state(module)
    with torch.no_grad():
        module["bridge"].weight.zero_()
        other["bridge"].weight.fill_(7.0)
    assert state["bridge.weight"].abs().sum() > 0, "the state is a copy"
    load_owned(other, state)
    assert torch.equal(other["bridge"].weight, state["bridge.weight"])
    assert set(state) == {"bridge.weight", "bridge.bias", "words.weight"}, "frozen by glob, but in no other place"


@pytest.mark.parametrize("change", ["missing", "surplus", "frozen", "shape"])
def test_any_other_set_is_refused_and_nothing_written(change):
    module = make()
    state = {name: torch.zeros_like(t) for name, t in owned_state(module).items()}
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
        load_owned(module, state)
    assert state_digest(module) == before
