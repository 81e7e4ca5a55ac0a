"""Metrics on their way out: worker -> spool file beside the driver -> progress bar and MLflow.

Training only ever appends a row to an actor. The file is the record; MLflow is fed from it by a thread that may fall
behind, fail and try again without training noticing. Rows are sent with the time at which they were measured, so one
that is sent twice is the same row to MLflow. Small files, as a sheet of samples, go the same way: into a folder beside
the rows, and from there to the run's artefacts.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

_BATCH = 900
"""MLflow takes at most 1,000 metrics in one request."""


class Spool:
    """Appends rows to ``path``; runs as an actor on the driver's node, called by the workers.

    A resumed run repeats the steps after its checkpoint and, being deterministic, their rows: a step that the file
    already holds is not written again.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_tail(self.path)
        self.last = max((row["step"] for row in read_rows(self.path)), default=-1)
        self._events: list[dict[str, Any]] = []
        self._fatal: IsthmusError | None = None
        self._failed: set[int] = set()

    def append(self, row: Mapping[str, Any]) -> None:
        """One row: ``{"step": int, "time": float, "metrics": {name: float}}``."""
        self.event({"kind": "row", **row})
        if row["step"] <= self.last:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:  # as a full disk: half a row would spoil the next one
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)
            raise
        self.last = int(row["step"])

    def artefact(self, name: str, data: bytes) -> None:
        """A file among the run's artefacts; ``name`` may have folders. One that is already there stays as it is."""
        target = artefacts_of(self.path) / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(target)

    def event(self, event: Mapping[str, Any]) -> None:
        """Something for the driver's screen or its result, in memory only."""
        self._events.append(dict(event))

    def events(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def fail(self, error: IsthmusError, rank: int) -> None:
        """A fault that a restart would meet again; the first one counts."""
        self._fatal = self._fatal or error
        self._failed.add(rank)

    def failed_ranks(self) -> int:
        """How many ranks have reported a fault."""
        return len(self._failed)

    def failure(self) -> IsthmusError | None:
        return self._fatal


def artefacts_of(spool: Path) -> Path:
    """The folder of a spool's files."""
    return spool.parent / "artefacts"


def read_rows(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The whole rows of a spool file from byte ``offset`` on."""
    return _read(path, offset)[0]


def _read(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return [row for line in whole.splitlines() if (row := _row(line)) is not None], offset + len(whole)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row; None of an empty line, or of one that was cut short."""
    try:
        row = json.loads(line) if line.strip() else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _drop_torn_tail(path: Path) -> None:
    """Cut what a killed process left of its last line, so that the next row starts a line of its own."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


class Shipper(threading.Thread):
    """Sends a spool's rows and files to MLflow in the background.

    Args:
        spool: the file.
        state: a small file that remembers how far it was sent, for the next process under the same run name.
        send: ``(rows)``; sends them or raises. See :func:`mlflow_sender`.
        send_file: ``(file, folder among the run's artefacts)``, likewise; None leaves the files where they are.
        every_s: pause between two looks at the file.
    """

    def __init__(
        self,
        spool: Path,
        state: Path,
        send: Callable[[list[dict[str, Any]]], None],
        send_file: Callable[[Path, str], None] | None = None,
        *,
        every_s: float = 2.0,
    ) -> None:
        super().__init__(name="isthmus-metrics", daemon=True)
        self.spool, self.state, self.every_s = spool, state, every_s
        self.send, self.send_file = send, send_file
        self.problem = ""
        self._offset = int(state.read_text()) if state.exists() else 0
        self._over = threading.Event()
        self._deadline = float("inf")

    def run(self) -> None:
        pause = self.every_s
        while True:
            over = self._over.is_set()
            sent = self._step()
            if over and (sent or time.monotonic() >= self._deadline):
                return
            pause = self.every_s if sent else min(pause * 2, 60.0)
            if over:
                time.sleep(min(0.5, max(self._deadline - time.monotonic(), 0.0)))
            else:
                self._over.wait(pause)

    def close(self, timeout_s: float = 20.0) -> int:
        """Send what is left, for at most about ``timeout_s``; returns how many rows could not be sent."""
        self._deadline = time.monotonic() + timeout_s
        self._over.set()
        if self.ident is not None:
            self.join(timeout_s + 1.0)
        return len(read_rows(self.spool, self._offset))

    def _step(self) -> bool:
        """Send everything that is there by now; whether that worked."""
        try:
            self._send_rows()
            self._send_files()
        except Exception as error:  # a tracking server's faults must not end a training run
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return False
        return True

    def _send_files(self) -> None:
        """Each file once: what was sent is remembered in a list beside the state."""
        folder, listed = artefacts_of(self.spool), self.state.with_suffix(".files")
        if self.send_file is None or not folder.is_dir():
            return
        known = set(listed.read_text().splitlines()) if listed.exists() else set()
        for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
            name = file.relative_to(folder)
            if str(name) not in known:
                self.send_file(file, name.parent.as_posix())
                with listed.open("a", encoding="utf-8") as record:
                    record.write(f"{name}\n")

    def _send_rows(self) -> None:
        rows, offset = _read(self.spool, self._offset)
        if not rows:
            return
        self.send(rows)
        self._offset = offset
        temporary = self.state.with_suffix(".tmp")
        temporary.write_text(str(offset))
        temporary.replace(self.state)


def mlflow_sender(run: Callable[[], tuple[str, str]]) -> Callable[[list[dict[str, Any]]], None]:
    """A ``send`` for :class:`Shipper`.

    Args:
        run: gives (tracking URI, run id); called when rows are to be sent, so a run may be opened late.
    """

    def send(rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        from isthmus.registry.store import client

        uri, run_id = run()
        api = client(uri)
        metrics = [
            Metric(name, float(value), int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for name, value in row["metrics"].items()
        ]
        for start in range(0, len(metrics), _BATCH):
            api.log_batch(run_id, metrics=metrics[start : start + _BATCH])

    return send


def mlflow_file_sender(run: Callable[[], tuple[str, str]]) -> Callable[[Path, str], None]:
    """A ``send_file`` for :class:`Shipper`; ``run`` as in :func:`mlflow_sender`."""

    def send(file: Path, folder: str) -> None:
        from isthmus.registry.store import log_artifacts

        uri, run_id = run()
        log_artifacts(uri, run_id, file, None if folder == "." else folder)

    return send
