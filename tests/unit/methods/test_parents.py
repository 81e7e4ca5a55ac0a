"""Further training: a run whose parent is a model of its own method."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from isthmus.config import VisionConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods import METHODS
from isthmus.methods.artefact import save_artefact, start_from
from isthmus.methods.blip2_stage1_config import LossWeights
from isthmus.models.freezing import owned_state
from method_cases import QFORMER, build, moved, recipe, run_config

GOING_ON = [name for name, spec in METHODS.items() if not spec.starts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parents")


def saved(method: str, folder: Path, **changes: object) -> Path:
    """A trained model of the method, as a folder."""
    config = recipe(method, folder, **changes)
    stage, out = build(config, with_vision=True), folder / "-".join((method, *changes))
    moved(stage.module)
    save_artefact(out, owned_state(stage.module), run_config(config), stage, {})
    return out


def test_there_are_such_methods() -> None:
    assert GOING_ON == ["blip2_stage1", "co_optimise", "guided", "projector"]


@pytest.mark.parametrize("method", GOING_ON)
def test_every_tensor_is_the_parent_s(method: str, folder: Path) -> None:
    parent, child = saved(method, folder), build(recipe(method, folder))
    before = {name: tensor.clone() for name, tensor in owned_state(child.module).items()}
    start_from(child, parent)
    wanted = build(recipe(method, folder))
    moved(wanted.module)
    for name, tensor in owned_state(child.module).items():
        assert torch.equal(tensor, owned_state(wanted.module)[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in owned_state(child.module).items())


def test_a_head_that_the_parent_has_not_starts_anew_and_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = saved("blip2_stage1", folder, weights=LossWeights(itm=0.0))
    child = build(recipe("blip2_stage1", folder))
    before = child.module.itm_head.weight.clone()
    with caplog.at_level(logging.WARNING):
        start_from(child, parent)
    assert torch.equal(child.module.itm_head.weight, before)
    assert "itm_head.weight" in caplog.text and "start anew" in caplog.text


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    parent = saved("blip2_stage1", folder)
    wider = build(recipe("blip2_stage1", folder, qformer=QFORMER.model_copy(update={"embed": 8})))
    with pytest.raises(WeightsError, match=r"vision_proj\.weight' is"):
        start_from(wider, parent)
    with pytest.raises(WeightsError, match="no tensor that this model has"):
        start_from(build(recipe("guided", folder)), saved("co_optimise", folder))


@pytest.mark.parametrize("method", GOING_ON)
def test_parents_of_another_method_or_encoder_are_refused_before_anything_starts(method: str, folder: Path) -> None:
    config, spec = recipe(method, folder), METHODS[method]
    other = "guided" if method == "projector" else "projector"
    with pytest.raises(ConfigError, match=f"is a '{other}' model"):
        spec.resolve(config, run_config(recipe(other, folder)))
    vision: VisionConfig = config.vision  # type: ignore[attr-defined]
    deeper = config.model_copy(update={"vision": vision.model_copy(update={"layer": vision.layer - 1})})
    with pytest.raises(ConfigError, match=r"another encoder than the parent's \(layer: parent"):
        spec.resolve(config, run_config(deeper))
    assert spec.resolve(config, run_config(config)) == config
