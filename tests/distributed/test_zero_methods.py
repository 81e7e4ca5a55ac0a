"""Every method on two gloo ranks under every ZeRO stage: one trajectory, frozen parts untouched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus.config import RunConfig
from isthmus.data.manifest import index
from isthmus.methods import METHODS
from isthmus.models.freezing import owned_parameters, state_digest
from isthmus.testing.gloo import run_ranks
from isthmus.testing.shards import make_dataset
from method_cases import ANSWERS, dropped, recipe
from training_cases import losses, worker_of

pytestmark = pytest.mark.timeout(600)
# Steep, so that larger steps blow up rounding: a small random language model, a choice among tokens.
LR = {"blip2_stage2": 5e-4, "guided": 1e-3}
EPS = 1e-6
"""Above the rounding of gradients: with torch's 1e-8, Adam makes whole steps of a gradient that is nothing else, and
which elements have such a gradient depends on the machine."""


def run(root: str, method: str, stage: int, steps: int) -> RunConfig:
    config = recipe(method, Path(root), **dropped(method))
    return RunConfig.model_validate(
        {
            "name": f"{method}-{stage}",
            "method": config.model_copy(update={"vision": config.vision}),
            "data": {"train": f"{root}/data", "max_cut_share": 1.0, "captions": "first"},
            "train": {
                "steps": steps, "global_batch": 8, "lr": LR.get(method, 5e-3), "log_every": 1,
                "checkpoint_every": steps, "precision": "fp32", "eps": EPS, "gradient_checkpointing": stage in (2, 3),
                "micro_batch": 3 if stage == 2 else None,
            },
            "zero": {"stage": stage},
            "storage": f"{root}/runs",
        }
    )  # fmt: skip


def frozen_digest(module: torch.nn.Module) -> str:
    """Of everything that is no trained parameter: backbones with their buffers."""
    owned = owned_parameters(module)
    everything = dict(module.named_parameters()) | dict(module.named_buffers())
    return state_digest({name: value.detach() for name, value in everything.items() if name not in owned})


def train_all(root: str, stages: tuple[int, ...], steps: int) -> dict[str, Any]:
    from isthmus.losses import language

    language.CHUNK_ELEMENTS = 300  # several chunks of logits, and not equally many on the ranks
    out: dict[str, Any] = {}
    for method in sorted(METHODS):
        for stage in stages:
            worker, said = worker_of(run(root, method, stage, steps))
            build = worker._build
            digests = []

            def noted(build=build, digests=digests) -> Any:
                made = build()
                digests.append(frozen_digest(made.module))
                return made

            worker._build = noted  # type: ignore[method-assign]
            worker.train()
            if stage < 3:
                digests.append(frozen_digest(worker.stage.module))
            out[f"{method}-{stage}"] = {"rows": said.rows, "digests": digests}
    return out


@dataclass(frozen=True)
class Made:
    root: Path
    ranks: list[dict[str, Any]]
    stages: tuple[int, ...]
    steps: int


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(((0, 3), 8), id="short"),
        pytest.param(((0, 1, 2, 3), 20), id="whole", marks=pytest.mark.slow),
    ],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    stages, steps = request.param
    root = tmp_path_factory.mktemp("zero")
    index(
        str(make_dataset(root / "data", 17, answers=ANSWERS))
    )  # each epoch's last batch is padding alone on the first rank
    for method in METHODS:
        recipe(method, root)  # writes the frozen parts before two processes would
    return Made(root, run_ranks(train_all, 2, str(root), stages, steps, timeout_s=400), stages, steps)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_zero_stages_give_one_trajectory(method: str, made: Made) -> None:
    root, first = made.root, made.ranks[0]
    plain = {row["step"]: row["metrics"] for row in first[f"{method}-0"]["rows"]}
    assert len(plain) == made.steps and plain[1]["loss"] > plain[made.steps]["loss"]
    expected = load_file(root / "runs" / f"{method}-0" / "artefact" / "model.safetensors")
    for stage in made.stages[1:]:
        for row in first[f"{method}-{stage}"]["rows"]:
            got = losses(row)
            assert got == pytest.approx({k: plain[row["step"]][k] for k in got}, abs=1e-5), (stage, row["step"])
        found = load_file(root / "runs" / f"{method}-{stage}" / "artefact" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # Softmax cannot see a key's bias: its gradient is rounding, of which Adam makes small steps.
            atol = 1e-4 if name.endswith("key.bias") else 1e-5
            torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_norms_by_part_make_up_the_global_norm(method: str, made: Made) -> None:
    plain = {row["step"]: row["metrics"] for row in made.ranks[0][f"{method}-0"]["rows"]}
    for stage in made.stages:
        for row in made.ranks[0][f"{method}-{stage}"]["rows"]:
            norms = {k: v for k, v in row["metrics"].items() if k.startswith("grad_norm/")}
            assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(row["metrics"]["grad_norm"])
            assert norms == pytest.approx({k: plain[row["step"]][k] for k in norms}, rel=1e-3, abs=1e-6), stage
            assert norms["grad_norm/frozen"] == 0.0
    named = {"blip2_stage1": "qformer.cross", "blip2_stage2": "projection", "projector": "image_projector.tokens"}
    named |= {"co_optimise": "second_asks.output", "guided": "streams.image", "guided_vqa": "streams.image"}
    assert plain[1][f"grad_norm/{named[method]}"] > 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_frozen_parts_are_bit_identical_after_training(method: str, made: Made) -> None:
    for rank in made.ranks:
        for stage in set(made.stages) - {3}:
            before, after = rank[f"{method}-{stage}"]["digests"]
            assert before == after, stage


@pytest.mark.parametrize("method", sorted(METHODS))
def test_verdicts_tell_the_shapes_of_partitioned_parameters(method: str, made: Made) -> None:
    plain, partitioned = (
        json.loads((made.root / "runs" / f"{method}-{stage}" / "artefact" / "freezing.json").read_text())
        for stage in (0, 3)
    )
    assert partitioned == plain
    assert any(len(entry["shape"]) == 2 for entry in plain.values())
