"""The way of a row from the worker to MLflow: nothing is lost, doubled or waited for."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import ConfigError
from isthmus.training.metrics import Shipper, Spool, read_rows


def row(step: int, **metrics: float) -> dict[str, Any]:
    return {"step": step, "time": 1000.0 + step, "metrics": metrics or {"loss": float(step)}}


def test_spool_does_not_repeat_the_steps_of_a_resumed_run(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "run" / "metrics.jsonl"))
    for step in (5, 10, 15):
        spool.append(row(step))
    again = Spool(str(tmp_path / "run" / "metrics.jsonl"))
    for step in (10, 15, 20):
        again.append(row(step))
    assert [r["step"] for r in read_rows(spool.path)] == [5, 10, 15, 20]
    assert [e["step"] for e in again.events()] == [10, 15, 20], "the screen sees every row"
    assert again.events() == []


def test_spool_cuts_what_a_killed_process_left_of_its_last_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(row(5)) + "\n" + json.dumps(row(10))[:17])
    spool = Spool(str(file))
    spool.append(row(10))
    assert [r["step"] for r in read_rows(file)] == [5, 10]


def test_a_row_that_a_full_disk_cuts_short_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.jsonl"
    spool = Spool(str(file))
    spool.append(row(1))
    opened = Path.open

    class Full:
        """Writes half of what it is given."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def write(self, text: str) -> None:
            self.stream.write(text[: len(text) // 2])
            self.stream.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(opened(self, *a, **k)))
    with pytest.raises(OSError, match="No space left"):
        spool.append(row(2))
    monkeypatch.undo()
    spool.append(row(2))
    spool.append(row(3))
    assert [r["step"] for r in read_rows(file)] == [1, 2, 3]


def test_a_line_that_is_no_row_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "m{"step": 3}\n\n{"step": 4}\n')
    assert [r["step"] for r in read_rows(file)] == [1, 4] and Spool(str(file)).last == 4


def test_the_first_fault_counts_and_ranks_are_counted_once(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "metrics.jsonl"))
    assert spool.failure() is None
    spool.fail(ConfigError("first"), 1)
    spool.fail(ConfigError("second"), 0)
    spool.fail(ConfigError("third"), 0)
    assert str(spool.failure()) == "first"
    assert spool.failed_ranks() == 2


class Server:
    """Takes rows, or refuses for a while."""

    def __init__(self, refusals: int = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        self.refusals, self.asked = refusals, threading.Event()

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        self.asked.set()
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("server went away\nlong trace")
        self.rows += rows


def ship(folder: Path, server: Server, *rows: dict[str, Any], timeout_s: float = 5.0) -> tuple[Shipper, int]:
    spool = Spool(str(folder / "metrics.jsonl"))
    shipper = Shipper(spool.path, folder / "metrics.sent", server, every_s=0.01)
    shipper.start()
    for item in rows:
        spool.append(item)
    return shipper, shipper.close(timeout_s)


def test_all_rows_arrive_once_over_two_processes(tmp_path: Path) -> None:
    server = Server()
    assert ship(tmp_path, server, row(1), row(2))[1] == 0
    assert ship(tmp_path, server, row(3))[1] == 0
    assert [r["step"] for r in server.rows] == [1, 2, 3]


def test_a_server_that_comes_back_gets_everything(tmp_path: Path) -> None:
    server = Server(refusals=2)
    assert ship(tmp_path, server, row(1), row(2))[1] == 0
    assert [r["step"] for r in server.rows] == [1, 2]


def test_a_server_that_stays_away_is_reported_and_served_by_the_next_run(tmp_path: Path) -> None:
    shipper, missing = ship(tmp_path, Server(refusals=10**6), row(1), row(2), timeout_s=0.2)
    assert missing == 2
    assert shipper.problem == "ConnectionError: server went away"
    server = Server()
    assert ship(tmp_path, server)[1] == 0
    assert [r["step"] for r in server.rows] == [1, 2]


class Shelf:
    """Takes files, or refuses for a while."""

    def __init__(self, refusals: int = 0) -> None:
        self.files: list[tuple[str, str, bytes]] = []
        self.refusals = refusals

    def __call__(self, file: Path, folder: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("server went away")
        self.files.append((folder, file.name, file.read_bytes()))


def ship_files(folder: Path, server: Server, shelf: Shelf, timeout_s: float = 5.0) -> Shipper:
    shipper = Shipper(folder / "metrics.jsonl", folder / "metrics.sent", server, shelf, every_s=0.01)
    shipper.start()
    shipper.close(timeout_s)
    return shipper


def test_files_go_to_the_artefacts_once_and_behind_an_absence(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "metrics.jsonl"))
    spool.append(row(1))
    spool.artefact("samples/step-1.png", b"one")
    spool.artefact("samples/step-1.png", b"another")
    server, shelf = Server(), Shelf(refusals=2)
    ship_files(tmp_path, server, shelf)
    assert shelf.files == [("samples", "step-1.png", b"one")]
    assert [r["step"] for r in server.rows] == [1], "rows wait for no file"
    spool.artefact("samples/step-2.png", b"two")
    again = Shelf()
    ship_files(tmp_path, server, again)
    assert again.files == [("samples", "step-2.png", b"two")]
    assert len(server.rows) == 1


def test_a_server_that_takes_no_file_is_named_and_ends_nothing(tmp_path: Path) -> None:
    Spool(str(tmp_path / "metrics.jsonl")).artefact("a.txt", b"a")
    assert ship_files(tmp_path, Server(), Shelf(refusals=10**6), timeout_s=0.2).problem.startswith("ConnectionError")
    shelf = Shelf()
    ship_files(tmp_path, Server(), shelf)
    assert shelf.files == [(".", "a.txt", b"a")]
