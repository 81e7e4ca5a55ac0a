"""Training: workers that die, checkpoints that are torn, disks that are full, a tracking server that is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import account
import chaos_method
import pytest
from chaos_help import Report, differences, free_port, judge, recovery, wait_for

from isthmus.training.driver import fit
from isthmus.training.metrics import read_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.mark.fault("worker SIGKILL")
def test_a_worker_is_killed(ground: Path, control: str, report: Report) -> None:
    fit(chaos_method.recipe(ground, "worker", method={"kill_at": 7}), progress=False)
    report.add(
        "worker SIGKILL",
        judge(ground, "worker"),
        recovery_s=recovery(ground, "worker", "killed"),
        differences=differences(ground, "worker", control),
    )


PHASES = {4: "tensors", 5: "moving", 6: "closing", 7: "manifest", 9: "pruning"}


@pytest.mark.fault(*(f"checkpoint torn while {phase}" for phase in PHASES.values()))
def test_a_checkpoint_is_torn_at_each_phase_of_its_writing(ground: Path, control: str, report: Report) -> None:
    run = chaos_method.recipe(
        ground, "torn", method={"tear": PHASES}, train={"checkpoint_every": 1}, cluster={"max_failures": len(PHASES)}
    )
    fit(run, progress=False)
    found, apart = judge(ground, "torn"), differences(ground, "torn", control)
    for step, phase in PHASES.items():
        seconds = recovery(ground, "torn", f"tear-{phase}")
        report.add(
            f"checkpoint torn while {phase}", found, recovery_s=seconds, note=f"at step {step}", differences=apart
        )


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of twelve megabytes."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted without the right to")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fault("disk full in a checkpoint")
def test_the_disk_is_full_when_a_checkpoint_is_written(ground: Path, control: str, report: Report, capfd: Any) -> None:
    place = ground / "runs" / "full" / "checkpoints"
    with small_disk(place):
        method = {"full": (4, 8), "disk": str(place), "kill_at": 10}
        fit(chaos_method.recipe(ground, "full", method=method), progress=False)
        assert "The checkpoint of step 6 was left out" in capfd.readouterr().err
        report.add(
            "disk full in a checkpoint",
            judge(ground, "full"),
            recovery_s=recovery(ground, "full", "killed"),
            note="one checkpoint left out and said so; a worker killed after that",
            differences=differences(ground, "full", control),
        )


class Server:
    """A real MLflow server over SQLite."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.process = folder, port, None
        self.uri = f"http://127.0.0.1:{port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for(self.answers, 180, process=self.process)

    def answers(self) -> bool:
        from isthmus.registry.store import check_tracking

        try:
            check_tracking(self.uri)
        except Exception:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.mark.fault("MLflow server down and back")
def test_the_tracking_server_goes_and_comes_back(ground: Path, control: str, report: Report) -> None:
    server = Server(ground / "mlflow", free_port())
    server.folder.mkdir()
    server.start()
    name, times = "tracked", {}

    def trouble() -> None:
        folder = ground / "faults" / name
        wait_for(lambda: any(entry["step"] >= 3 for entry in account.entries(folder)))
        server.kill()
        times["down"] = time.time()
        wait_for((folder / "held").exists)  # steps 4 to 9 were trained without it
        times["held"] = time.time()
        server.start()
        times["back"] = time.time()
        (folder / "go").touch()

    thread = threading.Thread(target=trouble)
    try:
        thread.start()
        run = chaos_method.recipe(ground, name, tracking=server.uri, method={"pause_s": 1.0, "hold_at": 10})
        fit(run, progress=False)
        thread.join()
        ended = time.time()
        sent = logged(server.uri, name)
    finally:
        thread.join(1)
        server.kill()
    rows = read_rows(ground / "runs" / name / "metrics.jsonl")
    missing = [row["step"] for row in rows if sent.get(row["step"]) != row["metrics"]["loss"]]
    found = account.entries(ground / "faults" / name)
    away = [entry["time"] for entry in found if entry["rank"] == 0 and times["down"] < entry["time"] < times["held"]]
    assert len(away) >= 4 and max(b - a for a, b in pairwise(away)) < 3, "training waited"
    assert not missing, f"{missing} of {len(rows)} rows are missing"
    report.add(
        "MLflow server down and back",
        judge(ground, name),
        recovery_s=ended - times["back"],
        note=f"{len(away)} steps while it was away; all {len(rows)} rows are there afterwards",
        differences=differences(ground, name, control),
    )


def logged(uri: str, name: str) -> dict[int, float]:
    """Step -> loss, as the server has it."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = [run for run in client.search_runs(experiments) if run.info.run_name == name]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert len({entry.step for entry in history}) == len({(entry.step, entry.value) for entry in history})
    return {entry.step: entry.value for entry in history}
