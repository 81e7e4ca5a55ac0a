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
from isthmus.data.manifest import Manifest, index
from isthmus.methods import METHODS
from isthmus.testing.clips import make_clips
from isthmus.testing.gloo import run_ranks
from method_cases import batch, build, moved

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


class Silent:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def event(self, event: dict[str, Any]) -> None:
        pass

    def artefact(self, name: str, data: bytes) -> None:
        pass


def train(root: str, stages: tuple[int, ...]) -> dict[int, list[dict[str, float]]]:
    """Losses of each step on this rank's clips, decoded as in a run, by ZeRO stage."""
    from isthmus.training.worker import Job, Worker

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
        job = Job(run, METHODS["co_optimise"], len(Manifest.load(f"{root}/clips")), None, {"data": {}}, None)
        said = Silent()
        Worker(job, torch.device("cpu"), said).train()
        losses = [{k: v for k, v in row["metrics"].items() if k.startswith("loss")} for row in said.rows]
        out[stage] = losses
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
