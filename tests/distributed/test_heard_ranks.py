"""Clips and sounds on two ranks: losses and gradients of one process; one trajectory under ZeRO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heard_cases import gradients, heard_recipe, heard_samples
from isthmus.config import RunConfig
from isthmus.contracts import Comm, LocalComm
from isthmus.data.manifest import index
from isthmus.testing.clips import make_clips
from isthmus.testing.gloo import run_ranks
from method_cases import batch, build, moved
from training_cases import losses, worker_of

ROWS = 6


def step(modality: str, comm: Comm) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Values and gradients of this rank's half of one global batch, whose last row is padding."""
    stage = build(heard_recipe(modality, dropout=0.1), comm)
    moved(stage.module)
    rows = heard_samples(stage, ROWS)
    mine = ROWS // comm.world_size
    part = batch(stage, rows[comm.rank * mine : (comm.rank + 1) * mine])
    last = comm.rank == comm.world_size - 1
    part = replace(part, valid_B=torch.arange(mine) < mine - last)
    terms = stage.module.train()(part)
    terms.total.backward()
    found = {name: g / comm.world_size for name, g in gradients(stage.module).items() if g is not None}
    return {name: float(value) for name, value in {**terms.parts, **terms.metrics}.items()}, found


def both_on_ranks() -> dict[str, Any]:
    from isthmus.training.comm import TorchComm

    torch.set_num_threads(1)
    return {modality: step(modality, TorchComm()) for modality in ("video-audio", "image-audio")}


def test_two_ranks_are_one() -> None:
    ranks = run_ranks(both_on_ranks, 2, timeout_s=200)
    for modality in ("video-audio", "image-audio"):
        values, expected = step(modality, LocalComm())
        (first, one), (second, other) = ranks[0][modality], ranks[1][modality]
        mean = {name: (first[name] + second[name]) / 2 for name in values}
        assert mean == pytest.approx(values, abs=2e-6)
        for name, gradient in expected.items():
            got = one[name] + other[name]
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def train(root: str, stages: tuple[int, ...]) -> dict[int, list[dict[str, float]]]:
    """Losses of each step on this rank's clips, decoded as in a run, by ZeRO stage."""
    out = {}
    for stage in stages:
        run = RunConfig.model_validate(
            {
                "name": f"heard-{stage}",
                "method": heard_recipe("video-audio", dropout=0.1),
                "data": {"train": f"{root}/clips"},
                "train": {"steps": 4, "global_batch": 4, "lr": 5e-3, "log_every": 1, "checkpoint_every": 4,
                          "precision": "fp32", "sample_sheet": 2 if stage < 3 else 0},
                "zero": {"stage": stage},
                "storage": f"{root}/runs",
            }
        )  # fmt: skip
        worker, said = worker_of(run)
        worker.train()
        out[stage] = [losses(row) for row in said.rows]
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_stages_give_one_trajectory_on_clips(tmp_path: Path) -> None:
    index(str(make_clips(tmp_path / "clips", 6)))
    first = run_ranks(train, 2, str(tmp_path), (0, 1, 2, 3), timeout_s=500)[0]
    assert len(first[0]) == 4 and first[0][0]["loss"] > 0
    for stage in (1, 2, 3):
        for row, plain in zip(first[stage], first[0], strict=True):
            assert row == pytest.approx(plain, abs=1e-5), stage
