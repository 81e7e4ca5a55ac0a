"""ZeRO with optimizer and parameters in the host's memory: the same training, and checkpoints that go either way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_method as tiny
from isthmus.config import RunConfig
from isthmus.data.manifest import index
from isthmus.methods import METHODS
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from method_cases import recipe as method_recipe
from training_cases import worker_of

STEPS = 20
OPTIMIZER, BOTH = {"offload_optimizer": "cpu"}, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
CASES: dict[str, dict[str, object]] = {
    "1": {"stage": 1}, "2": {"stage": 2}, "3": {"stage": 3},
    "1 optimizer": {"stage": 1, **OPTIMIZER}, "2 optimizer": {"stage": 2, **OPTIMIZER},
    "3 optimizer": {"stage": 3, **OPTIMIZER}, "3 parameters": {"stage": 3, "offload_parameters": "cpu"},
    "3 both": {"stage": 3, **BOTH},
}  # fmt: skip
SHORT = ("2", "3", "2 optimizer", "3 both")
SHORT_PAIRS = (("3 both", "2 optimizer"),)
PAIRS = (
    *SHORT_PAIRS,
    ("2 optimizer", "3"),
    ("2", "2 optimizer"),
    ("3", "3 both"),
    ("3 both", "3"),
    ("2 optimizer", "3 both"),
)


def recipe(root: str, name: str, zero: dict[str, object], **method: Any) -> RunConfig:
    train = {"precision": "fp32", "steps": STEPS, "log_every": 1, "checkpoint_every": 6}
    return tiny.recipe(root, name.replace(" ", "-"), method=method, train=train, zero=zero)


def stage2(root: str, name: str, zero: dict[str, object]) -> RunConfig:
    """BLIP-2's second stage, whose frozen language model is the larger part of what is offloaded."""
    values = recipe(root, name, zero).model_dump() | {"method": method_recipe("blip2_stage2", Path(root))}
    values["data"] |= {"max_cut_share": 1.0}
    values["train"] |= {"steps": 4, "lr": 5e-4, "checkpoint_every": 4}
    return RunConfig.model_validate(values)


def run_one(config: RunConfig) -> dict[str, Any]:
    worker, out = worker_of(config, METHODS.get(config.method.name, tiny.SPEC))
    fault = None
    try:
        worker.train()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    optimizer = worker.engine.optimizer if fault is None else None
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    return {"rows": out.rows, "events": out.events, "fault": fault, "offloaded": offloaded}


def scenarios(root: str, cases: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """All of them in one pair of processes, since starting the processes is what takes the time."""
    out = {name: run_one(recipe(root, name, CASES[name])) for name in cases}
    for before, after in pairs:
        name = f"{before} to {after}"
        run_one(recipe(root, name, CASES[before], break_at=13))
        out[name] = run_one(recipe(root, name, CASES[after]))
    for name in ("3", "3 both"):
        out[f"stage2 {name}"] = run_one(stage2(root, f"stage2 {name}", CASES[name]))
    out["nan"] = run_one(recipe(root, "nan", CASES["2 optimizer"], nan_at=4))
    return out


@dataclass(frozen=True)
class Made:
    root: Path
    found: dict[str, Any]
    cases: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((SHORT, SHORT_PAIRS), id="short"),
        pytest.param((tuple(CASES), PAIRS), id="whole", marks=pytest.mark.slow),
    ],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("offload")
    index(str(make_dataset(root / "data", 20)))
    method_recipe("blip2_stage2", root)  # writes the frozen parts before two processes would
    return Made(root, run_ranks(scenarios, 2, str(root), *request.param, timeout_s=280)[0], *request.param)


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name.replace(" ", "-") / "artefact" / "model.safetensors")


def losses(result: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["metrics"]["loss"] for row in result["rows"]}


def norms(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row["metrics"].items() if name.startswith("grad_norm/")}


def assert_same(root: Path, one: str, other: str) -> None:
    expected = weights(root, other)
    found = weights(root, one)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_twenty_steps_are_those_without_offload(made: Made) -> None:
    for case in (name for name in made.cases if " " in name):
        plain, result = made.found[case.split()[0]], made.found[case]
        assert (result["fault"], plain["fault"]) == (None, None), case
        assert (result["offloaded"], plain["offloaded"]) == ("parameters" not in case, False), case
        assert len(losses(plain)) == STEPS
        assert losses(result) == pytest.approx(losses(plain), abs=1e-5), case
        assert_same(made.root, case, case.split()[0])


def test_the_parts_norms_make_up_the_global_norm_whatever_is_offloaded(made: Made) -> None:
    plain = {row["step"]: norms(row) for row in made.found["2"]["rows"]}
    for case in made.cases:
        for row in made.found[case]["rows"]:
            found = norms(row)
            assert sum(value**2 for value in found.values()) ** 0.5 == pytest.approx(row["metrics"]["grad_norm"])
            assert found == pytest.approx(plain[row["step"]], rel=1e-3, abs=1e-7), (case, row["step"])


def test_a_checkpoint_goes_on_with_and_without_offload(made: Made) -> None:
    for before, after in made.pairs:
        result = made.found[f"{before} to {after}"]
        assert result["fault"] is None
        [event] = [e for e in result["events"] if e["kind"] == "resumed"]
        assert event["step"] in (6, 12)
        assert_same(made.root, f"{before} to {after}", "2")


def test_a_frozen_language_model_may_lie_in_the_host_s_memory(made: Made) -> None:
    assert made.found["stage2 3 both"]["fault"] is None
    assert losses(made.found["stage2 3 both"]) == pytest.approx(losses(made.found["stage2 3"]), abs=1e-5)
    assert_same(made.root, "stage2 3 both", "stage2 3")


def test_a_loss_that_is_no_number_stops_an_offloaded_run(made: Made) -> None:
    assert "no finite number at step 4" in made.found["nan"]["fault"]
