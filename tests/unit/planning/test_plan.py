"""A whole plan: from a recipe to days and costs, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from isthmus.errors import ConfigError
from isthmus.planning.hardware import find_gpu
from isthmus.planning.plan import Plan, Wishes, check_batch, reckon
from isthmus.planning.report import show_plan, verdict
from isthmus.planning.shapes import Texts
from isthmus.planning.subject import Subject, examine
from method_cases import recipe, run_config

WISHES = Wishes(find_gpu("h100"), 2, 4, 0.5)


def subject(folder: Path, method: str = "blip2_stage1", batch: int = 64) -> Subject:
    run = run_config(recipe(method, folder))
    train = run.train.model_copy(update={"global_batch": batch, "steps": 10})
    return examine(run.model_copy(update={"train": train}), Texts(6, 12))


def shown(plan: Plan) -> str:
    out = io.StringIO()
    show_plan(plan, Console(file=out, width=300))
    return out.getvalue()


def test_time_is_operations_at_the_assumed_rate(tmp_path: Path) -> None:
    found = subject(tmp_path)
    plan = reckon(found, WISHES)
    operations = sum(part.total for part in found.flops(8, 8).values())
    assert plan.step["matrix products"] == pytest.approx(operations / (989.4e12 * 0.5))
    assert plan.step["seconds"] == pytest.approx(
        plan.step["matrix products"] + plan.step["AdamW"] + plan.step["communication not hidden"]
    )
    assert plan.step["model-FLOPs utilisation"] < 0.5
    assert plan.run["images_per_worker"] == 8
    twice = reckon(found, replace(WISHES, utilisation=0.25))
    assert twice.step["matrix products"] == pytest.approx(2 * plan.step["matrix products"])


def test_run_and_cost(tmp_path: Path) -> None:
    found = subject(tmp_path)
    plan = reckon(found, replace(WISHES, samples=1000, epochs=3, price=2.0, bytes_per_sample=100))
    assert plan.whole["steps"] == 47  # 3,000 samples in batches of 64, the last one begun
    assert plan.whole["seconds"] == pytest.approx(47 * plan.step["seconds"])
    assert plan.whole["cost"] == pytest.approx(47 * plan.step["seconds"] / 3600 * 8 * 2.0)
    assert plan.data["bytes per run"] == 47 * 64 * 100
    assert reckon(found, WISHES).whole["steps"] == 10
    assert reckon(found, replace(WISHES, steps=5, samples=1000, epochs=3)).whole["steps"] == 5


def test_tokens(tmp_path: Path) -> None:
    plan = reckon(subject(tmp_path, "blip2_stage2"), WISHES)
    assert plan.step["query tokens"] == 64 * 4
    assert plan.step["caption tokens"] == 64 * 6
    assert plan.step["places of the language model"] == 64 * (4 + 12 - 1)


def test_a_batch_that_does_not_fit_names_the_one_that_does(tmp_path: Path) -> None:
    small = replace(find_gpu("h100"), memory=6.5e9)
    plan = reckon(subject(tmp_path, batch=80_000), replace(WISHES, gpu=small))
    assert not plan.chosen.fits
    largest = plan.chosen.largest_global_batch
    assert 0 < largest < 80_000
    assert f"The largest that fits under ZeRO 2 is {largest:,}." in verdict(plan)
    assert reckon(subject(tmp_path, batch=largest), replace(WISHES, gpu=small)).chosen.fits
    assert not reckon(subject(tmp_path, batch=largest + 8), replace(WISHES, gpu=small)).chosen.fits
    none = reckon(subject(tmp_path), replace(WISHES, gpu=replace(small, memory=1e9)))
    assert "not even one image a worker fits" in verdict(none)


def test_every_assumption_is_printed(tmp_path: Path) -> None:
    plan = reckon(subject(tmp_path, "blip2_stage2"), replace(WISHES, price=1.0))
    text = " ".join(shown(plan).split())
    for assumption in plan.assumptions:
        assert assumption.what in text
    for part in ("AdamW's moments", "gradient buckets", "language model", "wall clock", "cost", "Fits:"):
        assert part in text
    assert plan.as_json()["stages"][2]["total"] == pytest.approx(sum(plan.chosen.memory.values()))


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"64 does not divide among 24 workers.*=48 or train.global_batch=72"):
        check_batch(64, 3, 8)
    with pytest.raises(ConfigError, match=r"does not divide.*Give train.global_batch=24\.$"):
        check_batch(5, 3, 8)
    with pytest.raises(ConfigError, match="'projector' run cannot be planned"):
        subject(tmp_path, "projector")
    orphan = recipe("blip2_stage2", tmp_path, qformer=None, vision=None)
    with pytest.raises(ConfigError, match="--parent RECIPE"):
        examine(run_config(orphan), Texts(6, 12))
    parent = run_config(recipe("blip2_stage1", tmp_path))
    assert examine(run_config(orphan), Texts(6, 12), parent=parent).trained > 0


def test_longest_captions_are_cut_as_the_recipe_cuts_them(tmp_path: Path) -> None:
    run = run_config(recipe("blip2_stage1", tmp_path))
    assert examine(run, Texts(200, 400)).texts == Texts(16, 16)


def test_an_offloaded_optimizer_takes_longer_and_is_shown(tmp_path: Path) -> None:
    found = subject(tmp_path)
    zero = found.run.zero.model_copy(update={"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"})
    away = reckon(replace(found, run=found.run.model_copy(update={"zero": zero})), WISHES)
    here = reckon(
        replace(
            found,
            run=found.run.model_copy(
                update={"zero": zero.model_copy(update={"offload_optimizer": "none", "offload_parameters": "none"})}
            ),
        ),
        WISHES,
    )
    assert away.chosen.total < here.chosen.total
    assert away.step["AdamW"] > 5 * here.step["AdamW"]
    assert away.chosen.step_seconds > here.chosen.step_seconds
    assert away.stages[0] == here.stages[0]
    assert "in the host's memory" in shown(away) and "offloading" in shown(away)
    assert "in the host's memory" not in shown(here)
