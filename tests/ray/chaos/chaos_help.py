"""What the chaos tests share: the rows of the report, a run's account, waiting."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import account
import chaos_method


class Report:
    """Takes a row for each fault."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def add(
        self,
        fault: str,
        found: account.Account | None = None,
        *,
        recovery_s: float | None = None,
        note: str = "",
        lost: int = 0,
        doubled: int = 0,
        silent: int = 0,
        differences: Mapping[str, float] | None = None,
        within: float = 0.0,
    ) -> None:
        """What became of a fault. It was survived if nothing is lost, doubled or silent and no difference from the
        undisturbed run is above ``within``; asserts that."""
        counts = {"lost": lost, "doubled": doubled, "silent": silent}
        apart = dict(differences or {})
        if found is not None:
            counts = {"lost": found.lost, "doubled": found.doubled, "silent": found.silent}
        survived = not any(counts.values()) and all(value <= within for value in apart.values())
        row = {"fault": fault, "survived": survived, **counts}
        row["recovery_s"] = None if recovery_s is None else round(recovery_s, 1)
        row |= {"lost_steps": found.repeated if found else None, **apart, "note": note}
        self.rows.append(row)
        assert survived, row


def differences(root: Path, name: str, control: str, without: str = "") -> dict[str, float]:
    """How far a run's losses and weights (but for those that end with ``without``) are from the undisturbed run's."""
    return {
        "loss_difference": account.loss_difference(root, name, control),
        "weight_difference": account.weight_difference(root, name, control, without),
    }


def judge(root: Path, name: str, *, data: str = "", steps: int = 12, bad: frozenset[str] = frozenset()) -> Any:
    """The account of a finished run."""
    quarantine = root / "runs" / name / "quarantine.jsonl"
    return account.account(
        data or str(root / "data"), root / "faults" / name, quarantine, steps, chaos_method.BATCH, bad
    )


def quarantined(root: Path, name: str) -> dict[str, str]:
    """Key -> reason of the samples that a run has set aside."""
    file = root / "runs" / name / "quarantine.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["key"]: row["reason"] for row in rows}


def recovery(root: Path, name: str, mark: str) -> float:
    """Seconds from a fault, whose file holds its time, to the next step that was trained after it by other workers."""
    struck = float((root / "faults" / name / mark).read_text())
    return after(root, name, struck)


def after(root: Path, name: str, struck: float) -> float:
    """Seconds from the time ``struck`` to the first step of workers that had trained none before it."""
    found = account.entries(root / "faults" / name)
    before = {entry["pid"] for entry in found if entry["time"] <= struck}
    return min(entry["time"] for entry in found if entry["pid"] not in before) - struck


def wait_for(what: Any, seconds: float = 300, *, process: Any = None) -> None:
    """Until ``what()`` holds; fails when it takes too long or ``process`` ends."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it took too long"
        assert process is None or process.poll() is None, f"the driver ended by itself with {process.returncode}"
        time.sleep(0.05)


def free_port() -> int:
    """A port of the loopback that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
