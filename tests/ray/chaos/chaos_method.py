"""Stage 1 on small frozen parts, which writes down what it trains on and misbehaves on order. Pickled by value."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

import ray.cloudpickle as ray_cloudpickle
from pydantic import Field
from torch import nn

from isthmus.config import QFormerConfig, RunConfig
from isthmus.contracts import Batch, BuildContext, Stage
from isthmus.methods.blip2_stage1 import build
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.table import MethodSpec
from isthmus.testing.backbones import tiny_bert, tiny_vision_config

QFORMER = QFormerConfig(layers=2, width=32, heads=4, feed_forward=128, queries=4, dropout=0.1, embed=16)
BATCH = 8


class ChaosConfig(Blip2Stage1Config):
    """Faults are no part of the recipe: with them and without it is the same run. Each strikes once."""

    name: Literal["chaos"] = "chaos"  # type: ignore[assignment]
    folder: str = Field("", exclude=True)  # for the ledger and for the marks of faults that have struck
    pause_s: float = Field(0.0, exclude=True)  # at every step
    kill_at: int = Field(-1, exclude=True)  # step at which rank 1 is killed
    hold_at: int = Field(-1, exclude=True)  # step at which all wait until a test has made <folder>/go
    world_at: dict[int, int] = Field({}, exclude=True)  # steps that wait until so many workers are there
    tear: dict[int, str] = Field({}, exclude=True)  # checkpoint's step -> phase of its writing that kills rank 0
    full: tuple[int, int] = Field((-1, -1), exclude=True)  # between these steps the checkpoints' disk is full
    disk: str = Field("", exclude=True)


def recipe(root: Path, name: str, *, data: str = "", tracking: str = "", **sections: Any) -> RunConfig:
    """Twelve steps over ``<root>/data`` on two workers; ``sections`` are laid over it."""
    method = {
        "vision": tiny_vision_config(),
        "text": tiny_bert(root / "bert"),
        "qformer": QFORMER,
        "folder": str(root / "faults" / name),
        **sections.pop("method", {}),
    }
    values: dict[str, Any] = {
        "name": name,
        "method": ChaosConfig(**method),
        "data": {"train": data or str(root / "data"), "max_failed_share": 0.3},
        "train": {
            "steps": 12, "global_batch": BATCH, "log_every": 1, "checkpoint_every": 3, "lr": 1e-3,
            "warmup_steps": 2, "precision": "fp32",
        },
        "cluster": {"cpus_per_worker": 0.5},
        "storage": str(root / "runs"),
        "tracking": {"uri": tracking or f"sqlite:///{root}/runs/mlflow.db"},
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = {**values[section], **fields}
    (root / "faults" / name).mkdir(parents=True, exist_ok=True)
    return RunConfig(**values)


class Mischief:
    """A hook before every forward pass of one rank."""

    def __init__(self, config: ChaosConfig, rank: int, world: int) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.folder = Path(config.folder)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        batch: Batch = args[0]
        if not _module.training:
            return
        time.sleep(self.config.pause_s)
        if batch.step == self.config.kill_at and self.rank == 1 and self.first("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        while batch.step == self.config.hold_at and not (self.folder / "go").exists():
            self.say("held")
            time.sleep(0.05)
        while self.world != self.config.world_at.get(batch.step, self.world):
            self.say(f"waiting-{batch.step}")
            time.sleep(0.05)
        self.disk(batch.step)
        self.note(batch)

    def note(self, batch: Batch) -> None:
        """A line in this process's ledger."""
        import ray

        line = {
            "step": batch.step,
            "rank": self.rank,
            "world": self.world,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "time": time.time(),
            "ids": batch.sample_ids_B[batch.valid_B].tolist(),
        }
        with (self.folder / f"ledger-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def disk(self, step: int) -> None:
        """Fill the checkpoints' disk to its last byte, and make room again."""
        begin, end = self.config.full
        filler = Path(self.config.disk, "filler")
        if self.rank == 0 and step == begin and self.first("full"):
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    pass
        if self.rank == 0 and step == end:
            filler.unlink(missing_ok=True)

    def first(self, what: str) -> bool:
        """Whether this is the first time; the mark outlives the process, and holds the time."""
        mark = self.folder / what
        if mark.exists():
            return False
        mark.write_text(str(time.time()))
        return True

    def say(self, what: str) -> None:
        (self.folder / what).touch()


def tear_checkpoints(mischief: Mischief) -> None:
    """Put a death into this process at each phase of writing a checkpoint that the recipe names."""
    from isthmus import storage
    from isthmus.training import checkpoint

    tear = mischief.config.tear

    def dies(url: str, phase: str) -> bool:
        step = next((s for s in tear if f"step-{s:08d}-" in str(url)), None)
        return step is not None and tear[step] == phase and mischief.first(f"tear-{phase}")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save_file, put_file, write_manifest = checkpoint.save_file, checkpoint.put_file, checkpoint._write_manifest
    write_bytes, delete = storage.write_bytes, storage.delete

    def torn_save(tensors: Any, file: Path) -> None:
        save_file(tensors, file)
        if dies(str(file), "tensors"):
            os.truncate(file, file.stat().st_size // 2)
            die()

    def torn_put(file: Path, url: str) -> None:
        put_file(file, url)
        if dies(url, "moving"):
            die()

    def torn_close(whole: Any) -> Any:
        if dies(whole.url, "closing"):
            die()
        return write_manifest(whole)

    def torn_manifest(url: str, data: bytes) -> None:
        if url.endswith(checkpoint.MANIFEST) and dies(url, "manifest"):
            Path(url).write_bytes(data[: len(data) // 2])
            die()
        write_bytes(url, data)

    def torn_delete(url: str) -> None:
        delete(url)
        if url.endswith(checkpoint.MANIFEST) and dies(url, "pruning"):
            die()

    checkpoint.save_file, checkpoint.put_file, checkpoint._write_manifest = torn_save, torn_put, torn_close  # type: ignore[assignment]
    storage.write_bytes, storage.delete = torn_manifest, torn_delete  # type: ignore[assignment]


def build_chaos(config: ChaosConfig, context: BuildContext) -> Stage:
    """Stage 1 with the hook."""
    stage = build(config, context)
    mischief = Mischief(config, context.comm.rank, context.comm.world_size)
    stage.module.register_forward_pre_hook(mischief)
    if config.tear and context.comm.rank == 0:
        tear_checkpoints(mischief)
    return stage


SPEC = MethodSpec(ChaosConfig, build_chaos)
ray_cloudpickle.register_pickle_by_value(sys.modules[__name__])
