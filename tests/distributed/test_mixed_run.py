"""A real run on two data sets: left in the middle, and taken up by as many workers or by fewer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_method as tiny
from isthmus.config import RunConfig
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from training_cases import Kept

STEPS = 9


def recipe(root: str, name: str, *, workers: int = 2, **method: Any) -> RunConfig:
    sets = [{"url": f"{root}/large", "weight": 0.75}, {"url": f"{root}/small", "weight": 0.25}]
    return tiny.recipe(
        root, name, method=method, data={"train": None, "mixture": sets}, train={"precision": "fp32"},
        cluster={"workers": workers},
    )  # fmt: skip


def run_one(config: RunConfig) -> dict[str, Any]:
    from isthmus.data.manifest import Manifest
    from isthmus.registry.manifest import data_record
    from isthmus.training.worker import Job, Worker

    found = [Manifest.load(one.url) for one in config.data.sets]
    record = data_record(config.data, [(manifest.digest, len(manifest)) for manifest in found])
    sizes = tuple(len(manifest) for manifest in found)
    job = Job(config, tiny.SPEC, sum(sizes), None, {"data": record}, None, (), sizes)
    fault, said = None, Kept()
    try:
        Worker(job, torch.device("cpu"), said).train()
    except Exception as error:
        fault = str(error)
    return {"rows": said.rows, "fault": fault}


def scenarios(root: str) -> dict[str, Any]:
    broken = recipe(root, "broken", break_at=7)
    out = {"broken": run_one(broken), "calm": run_one(recipe(root, "calm"))}
    if torch.distributed.get_rank() == 0:
        shutil.copytree(f"{root}/runs/broken", f"{root}/runs/fewer")
    torch.distributed.barrier()
    out["mended"] = run_one(broken)
    return out


def alone(root: str) -> dict[str, Any]:
    return run_one(recipe(root, "fewer", workers=1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    from isthmus.data.manifest import index

    root = tmp_path_factory.mktemp("mixed")
    index(str(make_dataset(root / "large", 20)))
    index(str(make_dataset(root / "small", 3)))  # the same shards and keys
    found: dict[str, Any] = run_ranks(scenarios, 2, str(root), timeout_s=240)[0]
    found["fewer"] = run_ranks(alone, 1, str(root), timeout_s=120)[0]
    return root, found


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / "artefact" / "model.safetensors")


def test_a_run_left_in_the_middle_ends_as_an_undisturbed_one(made: tuple[Path, dict[str, Any]]) -> None:
    root, found = made
    assert "closed by peer" in found["broken"]["fault"]
    assert (found["calm"]["fault"], found["mended"]["fault"], found["fewer"]["fault"]) == (None, None, None)
    assert found["mended"]["rows"][0]["step"] > 1, "it was not resumed"
    for name, value in weights(root, "calm").items():
        assert torch.equal(weights(root, "broken")[name], value), name
        torch.testing.assert_close(weights(root, "fewer")[name], value, rtol=0, atol=1e-5)


def test_what_is_logged_and_recorded(made: tuple[Path, dict[str, Any]]) -> None:
    root, found = made
    last = found["calm"]["rows"][-1]
    assert last["step"] == STEPS
    logged = {name: value for name, value in last["metrics"].items() if name.startswith("epoch")}
    assert logged == {"epoch": 72 / 23, "epoch_large": 54 / 20, "epoch_small": 18 / 3}
    record = json.loads((root / "runs" / "calm" / "artefact" / "lineage.json").read_text())["data"]
    assert [(one["samples"], one["weight"]) for one in record["sets"]] == [(20, 3), (3, 1)]
