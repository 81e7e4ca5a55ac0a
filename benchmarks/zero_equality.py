"""One trajectory: 20 steps of every method under ZeRO 0 to 3 with one worker and with two, dropout included.

    python benchmarks/zero_equality.py --json equality.json

Real engines over gloo processes, the training loop's own worker, tiny frozen parts, fp32, dropout 0.1, warm-up, decay
and clipping as in any run; AdamW's epsilon is 1e-6 (``train.eps``). Everything is compared with ZeRO 0 on one worker:
losses at every step, trained parameters at the end. Left out of the parameters: biases of attention keys, which softmax
cannot see; their gradient is rounding, and Adam makes steps of it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import _passive  # noqa: F401 - before torch
import torch
from _steps import report
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from isthmus.config import CompressionConfig, FusionConfig, MethodConfig, QFormerConfig, RunConfig, TowerConfig
from isthmus.data.manifest import Manifest, index
from isthmus.methods import METHODS
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2Config
from isthmus.methods.co_optimise_config import AttentionConfig, CoOptimiseConfig, MatchConfig
from isthmus.methods.guided_config import GuidedConfig, RelationConfig
from isthmus.methods.guided_vqa import GuidedVqaConfig
from isthmus.methods.projector import ProjectorConfig
from isthmus.models.freezing import owned_parameters, state_digest
from isthmus.testing.backbones import tiny_bert, tiny_lm, tiny_vision_config
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset

STEPS, BATCH, SAMPLES, STAGES, WORKERS = 20, 8, 17, (0, 1, 2, 3), (1, 2)
QFORMER = QFormerConfig(layers=2, width=32, heads=4, feed_forward=128, queries=4, dropout=0.1, embed=16)
GUIDED: dict[str, Any] = {
    "image": TowerConfig(layers=2, width=24, heads=4, feed_forward=48, dropout=0.1),
    "compression": CompressionConfig(layers=(0, 1), keep=(0.5,)),
    "fusion": FusionConfig(text_layers=1, fusion_layers=1, width=32, heads=4, feed_forward=128, dropout=0.1, embed=16),
}
ANSWERS = ("cat", "dog", "two", "red", "yes")
EPS = 1e-6
"""Above the rounding of gradients: with torch's 1e-8 an element whose gradient is nothing else takes whole steps."""
RATE = {"blip2_stage2": 5e-4}  # its small random language model is steep: larger steps blow up rounding


def method_config(name: str, root: Path) -> MethodConfig:
    """A small configuration; its frozen parts are written below ``root`` where they are not yet."""
    text, vision = tiny_bert(root / "bert"), tiny_vision_config()
    configs: dict[str, MethodConfig] = {
        "blip2_stage1": Blip2Stage1Config(vision=vision, text=text, qformer=QFORMER),
        "blip2_stage2": Blip2Stage2Config(vision=vision, qformer=QFORMER, language=tiny_lm(root / "lm")),
        "co_optimise": CoOptimiseConfig(
            vision=vision,
            text=text,
            embed=16,
            dropout=0.1,
            attention=AttentionConfig(heads=4),
            itm=MatchConfig(weight=0.5),
        ),
        "guided": GuidedConfig(vision=vision, text=text, relation=RelationConfig(width=16, steps=2), **GUIDED),
        "guided_vqa": GuidedVqaConfig(vision=vision, text=text, answers=ANSWERS, **GUIDED),
        "projector": ProjectorConfig(vision=vision, text=text, embed=16, dropout=0.1),
    }
    return configs[name]


def recipe(root: str, method: str, stage: int, workers: int) -> RunConfig:
    train = {
        "steps": STEPS, "global_batch": BATCH, "lr": RATE.get(method, 5e-3), "warmup_steps": 5, "log_every": 1,
        "checkpoint_every": STEPS, "precision": "fp32", "eps": EPS,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "name": f"{method}-{stage}-{workers}",
            "method": method_config(method, Path(root)),
            "data": {"train": f"{root}/data", "max_cut_share": 1.0},
            "train": train,
            "zero": {"stage": stage},
            "cluster": {"workers": workers},
            "storage": f"{root}/runs",
        }
    )


class Rows:
    """Takes what a worker says; keeps the logged rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def event(self, event: dict[str, Any]) -> None:
        """Not of interest here."""

    def artefact(self, name: str, data: bytes) -> None:
        """Not of interest here."""


def frozen(module: torch.nn.Module) -> str:
    owned = owned_parameters(module)
    everything = dict(module.named_parameters()) | dict(module.named_buffers())
    return state_digest({name: value.detach() for name, value in everything.items() if name not in owned})


def train_all(root: str, workers: int, methods: list[str]) -> dict[str, Any]:
    """Every method under every stage, in one pair of processes."""
    from isthmus.training.worker import Job, Worker

    out: dict[str, Any] = {}
    for method in methods:
        for stage in STAGES:
            config = recipe(root, method, stage, workers)
            job = Job(config, METHODS[method], len(Manifest.load(config.data.train)), None, {"data": {}}, None)
            worker = Worker(job, torch.device("cpu"), said := Rows())
            worker.train()
            losses = [{k: v for k, v in r["metrics"].items() if k.startswith("loss")} for r in said.rows]
            digest = frozen(worker.stage.module) if stage < 3 else None  # ZeRO 3 leaves frozen parts in pieces too
            out[config.name] = {"losses": losses, "frozen": digest}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isthmus-zero-") as root:
        index(str(make_dataset(Path(root) / "data", SAMPLES, answers=ANSWERS)))
        for method in options.methods:
            method_config(method, Path(root))  # writes the frozen parts before two processes would
        found: dict[str, Any] = {}
        for workers in WORKERS:
            found |= run_ranks(train_all, workers, root, workers, options.methods, timeout_s=900)[0]
        figures = compare(root, found, options.methods)
    report(figures, options.json)


def seen(name: str, value: Tensor) -> Tensor:
    """A parameter without the bias of attention's keys: softmax cannot see it, so its gradient is rounding, which Adam
    scales up to steps of full size."""
    if name.endswith("key.bias"):
        return value[:0].sum()
    if name.endswith("qkv.bias"):  # timm's blocks have all three in one
        query, _, worth = value.chunk(3)
        return torch.cat([query, worth])
    return value


def compare(root: str, found: dict[str, Any], methods: list[str]) -> dict[str, object]:
    """The largest differences to ZeRO 0 on one worker, over everything and by case, and a table of them."""
    table = Table(
        "method", "ZeRO", "workers", "largest loss difference", "largest parameter difference", "frozen parts"
    )
    figures: dict[str, object] = {"steps": STEPS, "max_abs_loss_diff": 0.0, "max_abs_param_diff": 0.0}
    same = True
    for method in methods:
        first = f"{method}-0-1"
        weights = load_file(Path(root, "runs", first, "artefact", "model.safetensors"))
        for stage in STAGES:
            for workers in WORKERS:
                name = f"{method}-{stage}-{workers}"
                pairs = zip(found[first]["losses"], found[name]["losses"], strict=True)
                loss = max(abs(one[k] - two[k]) for one, two in pairs for k in one)
                other = load_file(Path(root, "runs", name, "artefact", "model.safetensors"))
                assert other.keys() == weights.keys()
                apart = {n: float(seen(n, value - other[n]).abs().max()) for n, value in weights.items()}
                worst = max(apart, key=lambda n: apart[n])
                parameter = apart[worst]
                figures[f"{name}.worst"] = worst
                digest = found[name]["frozen"]
                same = same and digest in (None, found[first]["frozen"])
                shown = (
                    "in pieces" if digest is None else "identical" if digest == found[first]["frozen"] else "CHANGED"
                )
                table.add_row(method, str(stage), str(workers), f"{loss:.1e}", f"{parameter:.1e}", shown)
                figures[f"{name}.loss"], figures[f"{name}.parameter"] = loss, parameter
                figures["max_abs_loss_diff"] = max(loss, float(str(figures["max_abs_loss_diff"])))
                figures["max_abs_param_diff"] = max(parameter, float(str(figures["max_abs_param_diff"])))
    Console().print(table)
    return {**figures, "frozen_identical": same}


if __name__ == "__main__":
    main()
