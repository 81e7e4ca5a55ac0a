"""A method small enough to train in a second, with faults to order. Pickled by value: workers need no import path."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray.cloudpickle as ray_cloudpickle
import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus.config import MethodConfig, RunConfig
from isthmus.contracts import Base, Batch, BuildContext, Comm, LossTerms, Reference, Sample, Stage, StageModule
from isthmus.methods.table import MethodSpec
from isthmus.models.noise import KeyedDropout, batch_keys

SIDE = 8


class TinyConfig(MethodConfig):
    name: str = "tiny"
    width: int = 6
    dropout: float = 0.1
    # Faults are no part of the recipe: with them and without it is the same run.
    die_at: int = Field(-1, exclude=True)  # step at which rank 1 is killed, once
    nan_at: int = Field(-1, exclude=True)  # step at which the loss is no number
    break_at: int = Field(-1, exclude=True)  # step at which every rank loses its peers, once
    marker: str = Field("", exclude=True)  # file that remembers the killing or breaking


class TinyModule(StageModule):
    """A frozen layer, a trained one with dropout, and a temperature: predicts two numbers made of the caption."""

    def __init__(self, config: TinyConfig, comm: Comm) -> None:
        super().__init__()
        self.config, self.comm = config, comm
        self.frozen = nn.Sequential(nn.Linear(3 * SIDE * SIDE, 32), nn.BatchNorm1d(32))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)
        self.frozen.base = Base("vision", "random", "0" * 64)
        self.hidden = nn.Linear(32, config.width)
        self.drop = KeyedDropout(config.dropout)
        self.out = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor([0.5]))

    def forward(self, batch: Batch) -> LossTerms:
        assert batch.pixels_BCHW is not None and batch.ids_BT is not None
        self._misbehave(batch)
        h = torch.tanh(self.hidden(self.frozen(batch.pixels_BCHW.flatten(1))))
        noise_B = batch_keys(0, batch.step, 0, len(batch), self.comm, h.device)
        error = (self.out(self.drop(h, noise_B)) / self.temperature - batch.ids_BT / 100.0).square().mean(1)
        valid = batch.valid_B.float()
        total = (error * valid).sum() * self.comm.world_size / self.comm.sum(valid.sum())
        if batch.step == self.config.nan_at:
            total = total * float("nan")
        return LossTerms(total, {"fit": total.detach()}, {"temperature": self.temperature.detach()[0]})

    def _misbehave(self, batch: Batch) -> None:
        marker = Path(f"{self.config.marker}-{self.comm.rank}")
        if batch.step == self.config.break_at and not marker.exists():
            marker.touch()
            raise RuntimeError("connection closed by peer")
        if batch.step == self.config.die_at and self.comm.rank == 1 and not Path(self.config.marker).exists():
            Path(self.config.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def to_pixels(image: object) -> np.ndarray:
    small = image.resize((SIDE, SIDE))  # type: ignore[attr-defined]
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255.0


def augment(image: object, seed: int) -> np.ndarray:
    return to_pixels(image)


def build(config: TinyConfig, context: BuildContext) -> Stage:
    torch.manual_seed(context.seed)
    module = TinyModule(config, context.comm)

    def collate(samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        ids = [[zlib.crc32(s.captions[0].encode()) % 100, zlib.crc32(s.key.encode()) % 100] for s in samples]
        return Batch(
            sample_ids_B=torch.tensor([s.id for s in samples]),
            valid_B=torch.ones(len(samples), dtype=torch.bool),
            step=step,
            epoch=epoch,
            pixels_BCHW=torch.from_numpy(np.stack([s.pixels_CHW for s in samples])),
            ids_BT=torch.tensor(ids),
            mask_BT=torch.ones(len(samples), 2, dtype=torch.int64),
        )

    def references(_: int) -> dict[str, Reference]:
        return {"fit": Reference(chance=0.33, floor=0.0)}

    facts = {"tokens": 1, "width": 32, "image_size": SIDE}
    return Stage(module, collate, to_pixels, augment, references, (module.frozen.base,), facts)


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics."""
    everything = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach() for name, value in everything if name.startswith("frozen")}


SPEC = MethodSpec(TinyConfig, build)
ray_cloudpickle.register_pickle_by_value(sys.modules[__name__])


def recipe(
    root: str, name: str, *, method: dict[str, object] | None = None, **sections: dict[str, object]
) -> RunConfig:
    """A run of nine steps over ``<root>/data`` on two workers, with ``sections`` laid over it."""
    values: dict[str, object] = {
        "name": name,
        "method": TinyConfig(marker=f"{root}/{name}.marker", **(method or {})),
        "data": {"train": f"{root}/data"},
        "train": {"steps": 9, "global_batch": 8, "log_every": 3, "checkpoint_every": 3, "lr": 1e-2, "warmup_steps": 2},
        "cluster": {"cpus_per_worker": 0.5},
        "storage": f"{root}/runs",
        "tracking": {"uri": f"sqlite:///{root}/runs/mlflow.db"},
    }
    for section, fields in sections.items():
        inner = values.get(section)
        values[section] = {**inner, **fields} if isinstance(inner, dict) and isinstance(fields, dict) else fields
    return RunConfig(**values)
