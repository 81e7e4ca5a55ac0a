"""Temperatures and log-variances stay within their bounds under every ZeRO stage, on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from isthmus.config import RunConfig
from isthmus.data.manifest import index
from isthmus.methods.co_optimise_config import WeightingConfig
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from method_cases import recipe as method_recipe
from training_cases import worker_of

RANGE = (0.0695, 0.0705)
SCALE, LIMIT = 90.0, 0.01  # of co_optimise, in place of its own, which a few steps would not reach
STEPS, LR = 2, 0.02  # each step of AdamW is as long as the rate, at first: out of every bound at once
ZERO: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "offloaded": {"stage": 3, "offload_optimizer": "cpu"},
}
CHANGES: dict[str, dict[str, Any]] = {
    "projector": {"temperature_range": RANGE},
    "co_optimise": {"weighting": WeightingConfig(kind="uncertainty"), "temperature": 1 / 99},
}


def run(root: str, method: str, zero: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": f"{method}-{zero}",
            "method": method_recipe(method, Path(root), **CHANGES[method]),
            "data": {"train": f"{root}/data", "max_cut_share": 1.0},
            "train": {
                "steps": STEPS, "global_batch": 8, "lr": LR, "min_lr": LR, "log_every": 1, "precision": "fp32",
                "eps": 1e-6, "sample_sheet": 0,
            },
            "zero": ZERO[zero],
            "storage": f"{root}/runs",
        }
    )  # fmt: skip


def train_all(root: str) -> dict[str, list[dict[str, Any]]]:
    from isthmus.methods import co_optimise_objective as objective

    objective.LARGEST_SCALE, objective.LIMIT = SCALE, LIMIT
    out = {}
    for method in CHANGES:
        for zero in ZERO:
            worker, said = worker_of(run(root, method, zero))
            worker.train()
            out[f"{method}-{zero}"] = said.rows
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("held")
    index(str(make_dataset(root / "data", 16)))
    for method in CHANGES:
        method_recipe(method, root)  # writes the frozen parts before two processes would
    return root, run_ranks(train_all, 2, str(root), timeout_s=240)[0]


@pytest.mark.parametrize("zero", sorted(ZERO))
def test_parameters_are_put_back_behind_each_step(zero: str, made: tuple[Path, dict[str, Any]]) -> None:
    root, rows = made
    found = {name: load_file(root / "runs" / f"{name}-{zero}" / "artefact" / "model.safetensors") for name in CHANGES}
    temperature = float(found["projector"]["temperature"])
    assert min(abs(temperature - bound) for bound in RANGE) < 1e-7, "it went for a bound, and stands on it"
    for value in [row["metrics"]["temperature"] for row in rows[f"projector-{zero}"]]:
        assert RANGE[0] - 1e-7 <= value <= RANGE[1] + 1e-7
    assert float(found["co_optimise"]["logit_scale"]) <= math.log(SCALE) + 1e-6
    assert found["co_optimise"]["uncertainty.log_variance"].abs().tolist() == pytest.approx([LIMIT] * 3)


def test_what_a_module_bounds_and_does_not_have_is_refused() -> None:
    import torch
    from torch import nn

    from isthmus.contracts import StageModule
    from isthmus.training.held import hold_bounds

    class Wrong(StageModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def bounds(self) -> dict[str, tuple[float, float]]:
            return {"scales": (0.0, 1.0)}

    engine = type("Engine", (), {"module": Wrong()})()
    with pytest.raises(KeyError, match="scales"):
        hold_bounds(engine, torch.optim.AdamW(engine.module.parameters()), stage=0)
