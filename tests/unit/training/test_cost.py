"""What a run has cost: all its tries count, and its rows say what of it was stepping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.training import cost
from isthmus.training.cost import Cost, read_cost


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(cost.time, "monotonic", lambda: now[0])
    return now


def rows(spool: Path, *facts: tuple[int, float, float]) -> None:
    lines = [{"step": s, "time": 0.0, "metrics": {"step_s": t, "memory/host_gib": m}} for s, t, m in facts]
    spool.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tries_add_up_however_they_end(tmp_path: Path, clock: list[float]) -> None:
    spool = tmp_path / "metrics.jsonl"
    assert read_cost(str(tmp_path)) == {}
    with pytest.raises(KeyboardInterrupt), Cost(str(tmp_path), spool):
        clock[0] += 30.0
        raise KeyboardInterrupt
    assert read_cost(str(tmp_path)) == {"seconds": 30.0}
    rows(spool, (1, 4.0, 0.5), (10, 1.0, 0.9), (20, 0.5, 0.7))
    clock[0] += 1000.0  # between two tries nothing counts
    with Cost(str(tmp_path), spool) as spent:
        clock[0] += 12.5
        spent.exported({"kind": "exported", "trainable": 7, "frozen": 90, "url": "somewhere"})
    assert read_cost(str(tmp_path)) == {
        "seconds": 42.5, "stepping_seconds": 18.0, "peak_memory_gib": 0.9,
        "trainable_parameters": 7, "frozen_parameters": 90,
    }  # fmt: skip


def test_a_torn_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / cost.COST).write_text('{"seconds": 3')
    assert read_cost(str(tmp_path)) == {}
