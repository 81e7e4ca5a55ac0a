"""What a run has cost: seconds over all its tries, stepping apart, trained parameters, memory. Kept in its folder."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus import storage
from isthmus.errors import StorageError
from isthmus.training.metrics import read_rows

COST = "cost.json"
"""In the run folder."""

_PEAKS = {"memory/host_gib": "peak_memory_gib", "memory/device_peak_gib": "peak_device_memory_gib"}


class Cost:
    """Adds the seconds of its ``with`` block, which is one try, to those of the tries before, however it ends.

    Args:
        folder: the run's.
        spool: the rows that the run has logged.
    """

    def __init__(self, folder: str, spool: Path) -> None:
        self.url, self.spool = storage.join(folder, COST), spool
        self._facts = read_cost(folder)

    def __enter__(self) -> Cost:
        self._started = time.monotonic()
        return self

    def exported(self, event: Mapping[str, Any]) -> None:
        """Take in what the workers said of the model that they wrote."""
        names = {"trainable": "trainable_parameters", "frozen": "frozen_parameters"}
        self._facts |= {names[key]: event[key] for key in names if key in event}

    def __exit__(self, kind: Any, *_: Any) -> None:
        seconds = self._facts.get("seconds", 0.0) + time.monotonic() - self._started
        self._facts |= {"seconds": round(seconds, 2), **_of_rows(read_rows(self.spool))}
        # A fault that ends the run is the one to tell of.
        with contextlib.suppress(*(() if kind is None else (StorageError,))):
            storage.write_bytes(self.url, json.dumps(self._facts, indent=1).encode())


def read_cost(folder: str) -> dict[str, Any]:
    """``seconds`` of all tries from the first check to the registered model, ``stepping_seconds`` of them between
    logged rows, ``trainable_parameters``, ``frozen_parameters``, ``peak_memory_gib`` of the worker that held most at a
    logged step. What is not known is left out.
    """
    url = storage.join(folder, COST)
    if not storage.exists(url):
        return {}
    try:
        facts = json.loads(storage.read_bytes(url))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _of_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each row stands for the steps since the row before it."""
    before, stepping = 0, 0.0
    peaks: dict[str, float] = {}
    for row in rows:
        values = row["metrics"]
        stepping += (row["step"] - before) * values.get("step_s", 0.0)
        before = row["step"]
        for name, known in _PEAKS.items():
            if name in values:
                peaks[known] = round(max(peaks.get(known, 0.0), values[name]), 3)
    return {"stepping_seconds": round(stepping, 2), **peaks} if rows else {}
