"""What the driver makes of the workers' events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_method as tiny
from isthmus.progress import Tracker
from isthmus.training.watch import Watch


def follow(tmp_path: Path, *events: dict, shown: bool = True) -> tuple[Watch, Tracker | None]:
    watch = Watch(tiny.recipe(str(tmp_path), "a"), None, quarantine=tmp_path / "quarantine.jsonl", shown=shown)
    watch._open("start a", 2, "workers")
    for event in events:
        watch._take(event)
    return watch, watch._tracker


REFERENCES = {"kind": "references", "references": {"loss_fit": {"chance": 0.33, "floor": 0.1}}}


def row(step: int, loss: float) -> dict:
    metrics = {"loss": loss, "loss_fit": loss, "images_per_s": 12.4, "data_wait_share": 0.25, "lr": 0.1}
    return {"kind": "row", "step": step, "metrics": metrics}


def test_losses_stand_beside_chance_and_floor(tmp_path: Path) -> None:
    watch, tracker = follow(tmp_path, REFERENCES, {"kind": "stepping", "step": 0}, row(1, 0.5), row(3, 0.25))
    assert tracker is not None and (tracker.done, tracker.total) == (3, 9)
    assert tracker.fields["loss_fit"] == "0.250 (chance 0.33, floor 0.10)"
    assert (tracker.fields["images/s"], tracker.fields["data wait"]) == ("12", "25%")
    assert watch.references() == {"loss_fit.chance": 0.33, "loss_fit.floor": 0.1}


def test_a_resumed_run_counts_only_its_own_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, tracker = follow(tmp_path, {"kind": "resumed", "step": 6}, {"kind": "stepping", "step": 6}, row(9, 0.1))
    assert tracker is not None and (tracker.done, tracker.total) == (3, 3)
    assert "resumes at step 6" in capsys.readouterr().err


def test_captions_that_lost_their_end_are_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    last = row(9, 0.1)
    last["metrics"]["captions_cut"] = 0.031
    watch, _ = follow(tmp_path, {"kind": "stepping", "step": 0}, row(1, 0.5), last)
    watch._tell_of_cut_captions()
    assert "3.1% of the captions were longer than the recipe's max_length" in capsys.readouterr().err
    last["metrics"]["captions_cut"] = 0.0002
    watch._tell_of_cut_captions()
    assert "Less than 0.1% of the captions" in capsys.readouterr().err
    watch, _ = follow(tmp_path, row(9, 0.1))
    watch._tell_of_cut_captions()
    assert "captions" not in capsys.readouterr().err


def test_unreadable_samples_are_written_down(tmp_path: Path) -> None:
    follow(tmp_path, {"kind": "unreadable", "id": 5, "key": "k", "reason": "cut short"}, shown=False)
    [line] = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"id": 5, "key": "k", "reason": "cut short"}


def test_nothing_is_shown_when_nothing_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, tracker = follow(tmp_path, {"kind": "stepping", "step": 0}, row(1, 0.5), shown=False)
    assert tracker is None
    assert capsys.readouterr().err == ""
