"""What became of every sample of a run: from the workers' ledgers, against the order that was to be kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from isthmus.data.manifest import Manifest
from isthmus.data.order import PADDING, Order
from isthmus.training.metrics import read_rows

Entry = dict[str, Any]


def entries(folder: Path) -> list[Entry]:
    """All lines of a run's ledgers, by time. A line that a death cut short is left out."""
    lines = [line for file in folder.glob("ledger-*.jsonl") for line in file.read_text().splitlines(keepends=True)]
    return sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda entry: entry["time"])


def effective(found: list[Entry]) -> dict[int, list[int]]:
    """Step -> the ids that its last execution trained on."""
    out: dict[int, list[int]] = {}
    for step in {entry["step"] for entry in found}:
        here = [entry for entry in found if entry["step"] == step]
        world = here[-1]["world"]
        last = {entry["rank"]: entry["ids"] for entry in here if entry["world"] == world}
        out[step] = [i for rank in range(world) for i in last.get(rank, [])]
    return out


@dataclass(frozen=True)
class Account:
    """Attributes:
    lost: readable samples that a step should have trained on and did not.
    doubled: samples that a step trained on and should not have, or twice.
    silent: samples that were not trained on and that no record names.
    repeated: steps that were executed again.
    """

    lost: int
    doubled: int
    silent: int
    repeated: int


def account(data: str, folder: Path, quarantine: Path, steps: int, batch: int, bad: frozenset[str]) -> Account:
    """The account of a run of ``steps``; ``bad`` are the keys of samples that cannot be read."""
    manifest = Manifest.load(data, verify=False)
    order = Order(len(manifest), batch)
    keys = dict(zip(manifest.ids.tolist(), manifest.table["key"].to_pylist(), strict=True))
    named = {json.loads(line)["id"] for line in quarantine.read_text().splitlines()} if quarantine.exists() else set()
    found = entries(folder)
    trained = effective(found)
    lost = doubled = silent = 0
    for step in range(steps):
        wanted = Counter(int(manifest.ids[row]) for row in order.batch(step) if row != PADDING)
        seen = Counter(trained.get(step, []))
        missing = wanted - seen
        lost += sum(n for i, n in missing.items() if keys[i] not in bad)
        silent += sum(n for i, n in missing.items() if i not in named)
        doubled += sum((seen - wanted).values())
    executed = {(entry["step"], entry["pid"]) for entry in found if entry["rank"] == 0}
    return Account(lost, doubled, silent, len(executed) - len(trained))


def losses(root: Path, name: str) -> dict[int, dict[str, float]]:
    """Step -> the logged losses of a run."""
    rows = read_rows(root / "runs" / name / "metrics.jsonl")
    return {row["step"]: {k: v for k, v in row["metrics"].items() if k.startswith("loss")} for row in rows}


def loss_difference(root: Path, name: str, control: str) -> float:
    """The largest difference of any logged loss; infinite where one of the two has not logged a step."""
    one, two = losses(root, name), losses(root, control)
    if one.keys() != two.keys():
        return float("inf")
    return max(abs(one[step][part] - two[step][part]) for step in one for part in one[step])


def weight_difference(root: Path, name: str, control: str, without: str = "") -> float:
    """The largest difference of any trained parameter; of those whose name ends with ``without`` none is looked at."""
    one, two = (load_file(root / "runs" / run / "artefact" / "model.safetensors") for run in (name, control))
    assert one.keys() == two.keys()
    return max(
        float((one[key].float() - two[key].float()).abs().max())
        for key in one
        if torch.numel(one[key]) and not (without and key.endswith(without))
    )
