"""A language model's blocks, tried on this processor: that they are its own, and counted as often as it has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isthmus.planning import trial
from isthmus.planning.compute import frozen_language
from isthmus.planning.frozen import measure_language
from isthmus.planning.hardware import CPU, Gpu
from isthmus.planning.language import Rows
from isthmus.planning.plan import Wishes, reckon
from isthmus.planning.shapes import Texts
from isthmus.planning.subject import examine
from isthmus.planning.trial import NAME, Trial, trial_of
from method_cases import recipe, run_config
from planning_cases import FAMILIES, language_config

MACHINE = Gpu(CPU, 1e11, 1e11, 1e11, 1e10, 1e10, 1e10, "made up", 1e10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("again", [False, True])
def test_what_is_tried_makes_the_products_of_the_whole_model(
    family: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock counts operations instead of seconds: what is reckoned from some blocks is then what all of them do."""
    language = measure_language(language_config(family, tmp_path).weights)
    rows = Rows(9, 6 if family == "t5" else 0, 5.0)

    def counted(work: object) -> float:
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            work()  # type: ignore[operator]
        return float(counter.get_total_flops())

    monkeypatch.setattr(trial, "_timed", counted)
    monkeypatch.setattr(trial, "_COLD", 1)  # one block, however small
    found = Trial(language, 4, rows, again=again).seconds(rounds=1)
    expected = frozen_language(language, 4, rows.read, rows.predicted, 4 * rows.labels, again=again).total
    # A T5's first decoder block is spared gradients that the others make, and it is the one that is tried.
    assert found == pytest.approx(expected, rel=0.15 if family == "t5" else 0.01)


def test_a_part_that_was_timed_takes_the_time_that_it_took(tmp_path: Path) -> None:
    subject = examine(run_config(recipe("blip2_stage2", tmp_path)), Texts(6, 12))
    images = subject.run.train.global_batch
    plain = reckon(subject, Wishes(MACHINE, 1, 1, 1.0))
    timed = reckon(subject, Wishes(replace(MACHINE, timed={NAME: 7.0}), 1, 1, 1.0))
    assert timed.step[f"{NAME}, timed"] == 7.0
    assert timed.step["matrix products"] == pytest.approx(
        plain.step["matrix products"] - subject.flops(images, 1)[NAME].total / 1e11
    )
    assert timed.step["seconds"] == pytest.approx(
        7.0 + timed.step["matrix products"] + timed.step["work on elements"] + timed.step["AdamW"]
    )


def test_parts_of_a_batch_hold_less_and_take_longer(tmp_path: Path) -> None:
    for method in ("blip2_stage1", "blip2_stage2"):
        run = run_config(recipe(method, tmp_path))
        whole = examine(run, Texts(6, 12))
        train = run.train.model_copy(update={"global_batch": 64, "micro_batch": 8})
        parts = examine(run.model_copy(update={"train": train}), Texts(6, 12))
        whole = replace(whole, run=parts.plain.run)
        one, other = (reckon(s, Wishes(MACHINE, 1, 1, 1.0)) for s in (parts, whole))
        assert one.chosen.memory["activations kept"] < 0.5 * other.chosen.memory["activations kept"]
        trained, at_once = (
            sum(part.total for name, part in s.flops(64, 1).items() if name != "image encoder") for s in (parts, whole)
        )
        assert trained > 1.25 * at_once
        assert one.step["work on elements"] > 1.4 * other.step["work on elements"]
        if parts.language is not None:
            assert (trial_of(parts, 64, bf16=False).sequences, trial_of(whole, 64, bf16=False).sequences) == (8, 64)
