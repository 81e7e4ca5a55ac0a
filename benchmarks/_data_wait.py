"""How long a trainer waits for data: the training loop itself, stage 1 with its frozen encoder inline."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from _contenders import Setting

from isthmus.config import QFormerConfig, RunConfig, VisionConfig
from isthmus.data.manifest import Manifest
from isthmus.methods import METHODS
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.testing.backbones import tiny_bert
from isthmus.testing.gloo import run_ranks

BATCH, STEPS, LOG_EVERY = 32, 26, 5


def data_wait(setting: Setting, scratch: Path) -> dict[str, float]:
    """The logged ``data_wait_share`` of a short run on one worker that reads through Ray Data: the median over windows
    of five steps, and the longest. The first steps, in which everything starts, do not count.

    The encoder is EfficientNet-Lite0 with random weights, which take as long as trained ones, the Q-Former that of the
    demo.
    """
    shares = run_ranks(_train, 1, _recipe(setting.url, scratch), timeout_s=900)[0]
    return {"data_wait_share": round(statistics.median(shares), 4), "data_wait_share_longest": round(max(shares), 4)}


def _recipe(url: str, scratch: Path) -> dict[str, Any]:
    shape = QFormerConfig(layers=2, width=384, heads=12, feed_forward=1536, queries=4, embed=256)
    vision = VisionConfig(name="tf_efficientnet_lite0", weights="random", image_size=192, layer=-1)
    method = Blip2Stage1Config(vision=vision, text=tiny_bert(scratch / "bert", width=384, heads=12), qformer=shape)
    return {
        "name": "ingest",
        "method": method,
        "data": {"train": url, "placement": "inline", "max_cut_share": 1.0},
        "train": {
            "steps": STEPS, "global_batch": BATCH, "lr": 1e-4, "log_every": LOG_EVERY, "checkpoint_every": STEPS,
        },
        "cluster": {"workers": 1},
        "storage": str(scratch / "runs"),
    }  # fmt: skip


class _Rows:
    """Takes what a worker says; keeps the logged rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def event(self, event: dict[str, Any]) -> None:
        """Not of interest here."""


def _train(recipe: dict[str, Any]) -> list[float]:
    from isthmus.ray_session import ray_session
    from isthmus.training.worker import Job, Worker

    config = RunConfig.model_validate(recipe)
    job = Job(config, METHODS[config.method.name], len(Manifest.load(config.data.train)), None, {"data": {}}, None)
    with ray_session():
        Worker(job, torch.device("cpu"), said := _Rows()).train()
    return [row["metrics"]["data_wait_share"] for row in said.rows if row["step"] > LOG_EVERY]
