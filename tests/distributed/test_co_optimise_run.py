"""A run with dynamic weights, left in the middle: what the method counts outside its parameters goes on bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus.config import RunConfig
from isthmus.methods.co_optimise_config import AttentionConfig, MatchConfig, WeightingConfig
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from method_cases import recipe
from training_cases import worker_of

STEPS, LEFT = 9, 7  # an epoch is two steps and a half: two are over by then, and one is under way


def run_config(root: str, name: str, stage: int = 0) -> RunConfig:
    method = recipe(
        "co_optimise", Path(root), weighting=WeightingConfig(kind="dwa"), itm=MatchConfig(), dropout=0.1,
        attention=AttentionConfig(heads=4, zero_init=False),
    )  # fmt: skip
    return RunConfig.model_validate(
        {
            "name": name, "method": method, "zero": {"stage": stage}, "storage": f"{root}/runs",
            "data": {"train": f"{root}/data", "max_cut_share": 1.0},
            "train": {
                "steps": STEPS, "global_batch": 8, "lr": 5e-3, "log_every": 1, "checkpoint_every": 3,
                "precision": "fp32",
            },
        }
    )  # fmt: skip


def run_one(config: RunConfig, leave: int | None = None, forget: bool = False) -> dict[str, Any]:
    """One worker's life. ``leave``: ends before that step. ``forget``: the control, which loses the counts."""
    worker, said = worker_of(config)
    step, start, weights = worker._step, worker._start, []

    def until(number: int, *rest: Any) -> None:
        if number == leave:
            raise RuntimeError("left")
        step(number, *rest)
        weights.append(worker.stage.module.average.weights(number, worker.stage.module.average.epoch))

    def begin() -> int:
        # A text's features differ in their last bits with its company in the encoder's batch: here all come at once.
        texts = [f"{kind} {n}" for n in range(20) for kind in ("picture number", "noise")]
        worker.stage.module.memory.read(texts)
        done = start()
        if forget:
            average = worker.stage.module.average
            average.past, average.steps = [], 0
        return done

    worker._step, worker._start = until, begin  # type: ignore[method-assign]
    try:
        worker.train()
    except RuntimeError as error:
        assert str(error) == "left"
    return {"rows": said.rows, "weights": weights}


def scenarios(root: str) -> dict[str, Any]:
    out = {"calm": run_one(run_config(root, "calm"))}
    run_one(run_config(root, "left"), leave=LEFT)
    if torch.distributed.get_rank() == 0:
        for name in ("forgetful", "moved"):
            shutil.copytree(f"{root}/runs/left", f"{root}/runs/{name}")
    torch.distributed.barrier()
    out["left"] = run_one(run_config(root, "left"))
    out["moved"] = run_one(run_config(root, "moved", stage=3))
    out["forgetful"] = run_one(run_config(root, "forgetful"), leave=STEPS - 1, forget=True)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    from isthmus.data.manifest import index

    root = tmp_path_factory.mktemp("co-optimised")
    index(str(make_dataset(root / "data", 20)))
    recipe("co_optimise", root)
    ranks = run_ranks(scenarios, 2, str(root), timeout_s=240)
    return root, ranks


def weights_of(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / "artefact" / "model.safetensors")


def test_a_resumed_run_is_the_uninterrupted_one(made: tuple[Path, list[dict[str, Any]]]) -> None:
    root, ranks = made
    calm, left = ranks[0]["calm"], ranks[0]["left"]
    assert calm["weights"][-1] != [1.0, 1.0] and len(calm["rows"]) == STEPS and left["rows"][0]["step"] == 7
    assert left["weights"] == calm["weights"][-len(left["weights"]) :]
    for name, value in weights_of(root, "calm").items():
        assert torch.equal(weights_of(root, "left")[name], value), name


def test_every_rank_has_the_same_weights(made: tuple[Path, list[dict[str, Any]]]) -> None:
    for name in ("calm", "left", "moved"):
        assert made[1][0][name]["weights"] == made[1][1][name]["weights"]


def test_a_run_that_lost_its_counts_would_be_another(made: tuple[Path, list[dict[str, Any]]]) -> None:
    forgetful, left = (made[1][0][name]["weights"] for name in ("forgetful", "left"))
    assert forgetful != left[: len(forgetful)]


def test_another_zero_stage_takes_the_counts_over(made: tuple[Path, list[dict[str, Any]]]) -> None:
    root, ranks = made
    for ours, theirs in zip(ranks[0]["moved"]["weights"], ranks[0]["left"]["weights"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for name, value in weights_of(root, "calm").items():
        if not name.endswith("key.bias"):  # softmax cannot see it
            torch.testing.assert_close(weights_of(root, "moved")[name], value, rtol=0, atol=1e-5)
