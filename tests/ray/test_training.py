"""fit() from a recipe to a registered model on two Ray Train workers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_method as tiny
from isthmus.config import TrackingConfig
from isthmus.contracts import ModelVersion
from isthmus.data.manifest import index
from isthmus.errors import ConfigError, IsthmusError
from isthmus.methods import METHODS
from isthmus.registry import show_model
from isthmus.registry.store import client
from isthmus.testing.shards import make_dataset
from isthmus.training.cost import read_cost
from isthmus.training.driver import fit
from isthmus.training.metrics import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

MODEL = {"name": "tiny", "alias": "candidate"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> Any:
    folder = tmp_path_factory.mktemp("training")
    index(str(make_dataset(folder / "data", 20)))
    METHODS["tiny"] = tiny.SPEC
    yield str(folder)
    del METHODS["tiny"]


@pytest.fixture(scope="module")
def calm(root: str) -> ModelVersion:
    """An undisturbed run, registered."""
    return fit(tiny.recipe(root, "calm", model=MODEL), progress=False)


def weights(version: ModelVersion) -> dict[str, torch.Tensor]:
    return load_file(Path(version.path) / "model.safetensors")


def losses(root: str, name: str) -> dict[int, float]:
    return {row["step"]: row["metrics"]["loss"] for row in read_rows(Path(root) / "runs" / name / "metrics.jsonl")}


def test_a_run_ends_as_a_registered_model_with_all_that_tells_its_origin(root: str, calm: ModelVersion) -> None:
    assert (calm.name, calm.version, calm.alias, calm.uri) == ("tiny", "1", "candidate", "models:/tiny@candidate")
    for file in ("recipe.yaml", "model.safetensors", "bases.json", "lineage.json", "freezing.json"):
        assert (Path(calm.path) / file).is_file(), file
    assert calm.lineage["data"]["samples"] == 20
    assert calm.lineage["bases"] == [{"role": "vision", "weights": "random", "digest": "0" * 64}]
    shown = show_model(calm.uri, TrackingConfig(uri=f"sqlite:///{root}/runs/mlflow.db"))
    assert shown["params"]["train.lr"] == "0.01"
    assert shown["params"]["reference.loss_fit.chance"] == "0.33"
    assert shown["metrics"]["loss"] == losses(root, "calm")[9]
    assert sorted(losses(root, "calm")) == [1, 3, 6, 9]
    assert {"grad_norm/hidden", "memory/host_gib", "system/cpu_utilization_percentage"} <= shown["metrics"].keys()


def test_a_sheet_of_samples_is_among_the_run_s_artefacts(root: str, calm: ModelVersion) -> None:
    stored = json.loads((Path(root) / "runs" / "calm" / "mlflow-run.json").read_text())
    listed = client(stored["uri"]).list_artifacts(stored["run_id"], "samples")
    assert [file.path for file in listed] == [f"samples/step-00000009.{end}" for end in ("json", "png")]
    assert all(file.file_size > 100 for file in listed)


def test_a_finished_run_returns_at_once_and_under_a_new_alias(root: str, calm: ModelVersion) -> None:
    file = Path(root) / "runs" / "calm" / "metrics.jsonl"
    before = file.stat().st_mtime_ns
    again = fit(tiny.recipe(root, "calm", model=MODEL), progress=False)
    assert (again.version, again.uri, again.path) == (calm.version, calm.uri, calm.path)
    other = fit(tiny.recipe(root, "calm", model={"name": "tiny", "alias": "production"}), progress=False)
    assert (other.version, other.uri) == ("1", "models:/tiny@production")
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"train\.lr: was 0\.01, is 0\.5"):
        fit(tiny.recipe(root, "calm", model=MODEL, train={"lr": 0.5}), progress=False)


def test_without_workers_this_process_trains_with_the_same_result(root: str, calm: ModelVersion) -> None:
    here = {"workers": 0}
    threads = torch.get_num_threads()
    alone = fit(tiny.recipe(root, "alone", cluster=here), progress=False)
    for steps in (3, 6):  # stopped after three steps, and taken up by the same process
        fit(tiny.recipe(root, "again", train={"steps": steps}, cluster=here), progress=False)
    assert losses(root, "again").keys() == {1, 3, 6}
    assert losses(root, "alone")[1] == pytest.approx(losses(root, "calm")[1], rel=1e-5)
    assert losses(root, "alone") == pytest.approx(losses(root, "calm"), rel=5e-3)  # bf16, where the machine has it
    assert weights(alone).keys() == weights(calm).keys()
    assert torch.get_num_threads() == threads and "LOCAL_RANK" not in os.environ
    cost = read_cost(f"{root}/runs/alone")
    assert cost["seconds"] > cost["stepping_seconds"] > 0 and cost["trainable_parameters"] > 0
    with pytest.raises(IsthmusError, match="no finite number at step 4"):
        fit(tiny.recipe(root, "nan-here", method={"nan_at": 4}, cluster=here), progress=False)


@pytest.mark.slow  # `make chaos` has it too, with every other death
def test_a_killed_worker_changes_nothing_in_the_result(root: str, calm: ModelVersion) -> None:
    killed = fit(tiny.recipe(root, "killed", method={"die_at": 7}), progress=False)
    assert Path(f"{root}/killed.marker").exists(), "the worker was not killed"
    assert killed.version == "", "nothing was to be registered"
    assert losses(root, "killed") == losses(root, "calm")
    for name, value in weights(calm).items():
        assert torch.equal(weights(killed)[name], value), name


@pytest.mark.slow  # what the workers themselves do is tested without Ray
def test_a_fault_in_training_is_raised_once_as_itself(root: str) -> None:
    with pytest.raises(IsthmusError, match="no finite number at step 4"):
        fit(tiny.recipe(root, "nan", method={"nan_at": 4}), progress=False)
    assert not (Path(root) / "runs" / "nan" / "artefact").exists()
    assert not (Path(root) / "runs" / "nan" / "finished.json").exists()
