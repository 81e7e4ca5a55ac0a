"""What a model came from: recipe digest, the fields that may change between runs of one name, lineage."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import isthmus
from isthmus.config import DataConfig, RunConfig, whole_weights
from isthmus.config.later import CAME_LATER
from isthmus.contracts import Base, ModelVersion

MAY_CHANGE = (
    "cluster",
    "data.cache",
    "data.decode_workers",
    "data.max_cut_share",
    "data.max_failed_share",
    "data.mixture",
    "data.prefetch",
    "data.train",
    "model",
    "storage",
    "tracking",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.log_every",
    "train.sample_sheet",
)
"""Recipe fields (or whole sections) that leave the trained parameters as they are. The place of the data is among them:
its content, and the shares of a mixture, are compared by digest."""

ROUNDING = (
    "train.gradient_checkpointing",
    "train.micro_batch",
    "zero.offload_optimizer",
    "zero.offload_parameters",
    "zero.stage",
)
"""Fields that decide how the same sums are made: a run may go on with others."""

MAY_GROW = "train.steps"


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` -> ``{"train.lr": 1}``."""
    out: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def settled_fields(run: RunConfig) -> dict[str, Any]:
    """The flattened recipe without the fields of :data:`MAY_CHANGE`."""
    flat = flatten(run.model_dump(mode="json"))
    return {k: v for k, v in flat.items() if not any(k == free or k.startswith(f"{free}.") for free in MAY_CHANGE)}


def changed_fields(before: RunConfig, after: RunConfig) -> list[str]:
    """Sentences naming each field that a run of the same name may not change, with both values; empty when none did."""
    old, new = settled_fields(before), settled_fields(after)
    changes = []
    for field in sorted(old.keys() | new.keys()):
        was, now = old.get(field), new.get(field)
        if (
            was == now
            or field in ROUNDING
            or (field == MAY_GROW and isinstance(was, int) and isinstance(now, int) and now > was)
        ):
            continue
        changes.append(f"{field}: was {was!r}, is {now!r}")
    return changes


def recipe_digest(run: RunConfig, lineage: Mapping[str, Any]) -> str:
    """sha256 of all that decides a run's result: the settled fields, the data's digest, the parent and its version."""
    parent = lineage.get("parent") or {}
    content = [parent["digest"]] if parent.get("digest") else []
    facts = {
        "recipe": _without_later(settled_fields(run)),
        "data": lineage.get("data", {}).get("digest"),
        "parent": [parent.get("name"), parent.get("version"), *content],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def run_identity(run: RunConfig, lineage: Mapping[str, Any]) -> dict[str, str]:
    """What stays the same over all tries of a run, as digests by name. Other checkpoints are not the run's."""
    fixed = {k: v for k, v in settled_fields(run).items() if k not in ("name", MAY_GROW, *ROUNDING)}
    recipe = hashlib.sha256(json.dumps(_without_later(fixed), sort_keys=True).encode()).hexdigest()
    data = lineage.get("data", {}).get("digest")
    return {"recipe": recipe, **({"data": data} if data else {})}


def _without_later(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in CAME_LATER or value != CAME_LATER[name]}


def data_record(data: DataConfig, found: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """What a run was trained on; ``found`` is (digest, samples) of each data set.

    A mixture's digest stands for its sets' digests, in their order, and for their shares. A control's record says so.
    """
    control = {"shuffled_pairs": True} if data.shuffled_pairs else {}
    if data.mixture is None:
        [(digest, samples)] = found
        return {"url": data.train, "digest": digest, "samples": samples, **control}
    weights = whole_weights([one.weight for one in data.mixture])
    shares = [[digest, weight] for (digest, _), weight in zip(found, weights, strict=True)]
    sets = [
        {"url": one.url, "digest": digest, "samples": samples, "weight": weight}
        for one, weight, (digest, samples) in zip(data.mixture, weights, found, strict=True)
    ]
    whole = hashlib.sha256(json.dumps(["mixture", shares]).encode()).hexdigest()
    return {"digest": whole, "samples": sum(samples for _, samples in found), "sets": sets, **control}


def lineage(*, data: Mapping[str, Any], parent: ModelVersion | None) -> dict[str, Any]:
    """Where a model comes from, as written into its artefact and registry entry; ``data`` is a :func:`data_record`."""
    return {
        "data": dict(data),
        "parent": _parent_record(parent) if parent else None,
        "code": {"package": isthmus.__version__, "commit": code_commit()},
    }


def _parent_record(parent: ModelVersion) -> dict[str, str]:
    """A registered version is what it is for good; what a folder holds is told by its content."""
    found = {"name": parent.name, "version": parent.version, "uri": parent.uri}
    if parent.version:
        return found
    with Path(parent.path, "model.safetensors").open("rb") as stream:
        return {**found, "digest": hashlib.file_digest(stream, "sha256").hexdigest()}


def with_bases(lineage: Mapping[str, Any], bases: Iterable[Base]) -> dict[str, Any]:
    """``lineage`` with the digests of the frozen parts."""
    return {**lineage, "bases": [{"role": b.role, "weights": b.weights, "digest": b.digest} for b in bases]}


def code_commit() -> str | None:
    """Commit of the checkout this package runs from (``-dirty`` when it was edited); None for an installed package."""
    folder = Path(isthmus.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
