"""Doctor: what it finds wrong, and that every fault comes with its mend."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from isthmus import doctor
from isthmus.doctor import Check


def only(checks: list[Check], name: str) -> Check:
    (found,) = [c for c in checks if c.name == name]
    return found


def test_whatever_is_wrong_has_a_mend() -> None:
    checks = doctor.examine()
    assert {"python", "torch", "torchvision", "GPU", "memory", "java", "MLflow", "S3", "Ray"} <= {
        c.name for c in checks
    }
    assert [c for c in checks if c.level != "ok" and not c.mend] == []
    assert [c for c in checks if c.level == "ok" and c.mend] == []


def test_a_missing_package_and_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"ray": "2.60.0", "torch": "2.5.1+cpu", "timm": "1.0.20"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    wanted = {"ray": ">=2.60", "torch": ">=2.6", "timm": ">=1.0.20", "s3fs": ">=2025.3"}
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"ray": "2.60.0", "timm": "1.0.31"})
    monkeypatch.setattr(
        doctor, "metadata", SimpleNamespace(version=version, PackageNotFoundError=metadata.PackageNotFoundError)
    )
    checks = list(doctor._packages())
    assert only(checks, "torch").level == "fault"
    assert only(checks, "s3fs").found == "not installed"
    drift = only(checks, "package versions")
    assert (drift.level, drift.found) == ("note", "timm 1.0.20 (tested: 1.0.31)")


def test_requirements_are_read_without_extras() -> None:
    found = doctor.requirements()
    assert found["ray"] == ">=2.60"
    assert "pytest" not in found
    assert set(found) <= set(doctor.tested_versions())


def test_too_little_memory_is_a_fault() -> None:
    assert doctor._enough("memory", 2.0, 6, "mend").level == "fault"
    assert doctor._enough("memory", 2.0, 6, "mend").mend == "mend"
    assert doctor._enough("memory", 7.0, 6, "mend") == Check("memory", "ok", "7.0 GiB")


def test_missing_programs_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/pip" if name == "pip" else None)
    checks = list(doctor._programs())
    assert only(checks, "package clients").level == "note"
    assert "npm, apt-get" in only(checks, "package clients").mend
    assert only(checks, "java").level == "note"


@pytest.mark.parametrize(
    ("environment", "level", "says"),
    [
        ({}, "ok", "not set up"),
        ({"AWS_ACCESS_KEY_ID": "k"}, "fault", "half a key pair"),
        ({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}, "ok", "own endpoint"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "fault", "does not answer"),
    ],
)
def test_object_store(environment: dict[str, str], level: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (check,) = doctor._object_store()
    assert check.level == level
    assert says in check.found


def test_a_tracking_server_that_is_away_is_a_fault(monkeypatch: pytest.MonkeyPatch, away: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (check,) = doctor._tracking()
    assert check.level == "fault"
    assert "http://127.0.0.1:9" in check.found


def test_passwords_are_not_shown() -> None:
    assert doctor._without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


def test_a_check_that_breaks_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Check]:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_python", broken)
    checks = doctor.examine()
    assert only(checks, "broken").level == "fault"
    assert only(checks, "Ray").level == "ok"


def test_the_table_shows_every_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    doctor.print_checks([Check("java", "note", "none [here]", "Install a JRE."), Check("GPU", "ok", "H100")])
    shown = capsys.readouterr().out
    assert "none [here]" in shown
    assert "Install a JRE." in shown


def test_the_command_fails_on_a_fault(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from isthmus import cli

    monkeypatch.setattr(doctor, "examine", lambda: [Check("memory", "fault", "1 GiB", "Buy more.")])
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--json"])
    assert ended.value.code == 2
    answer = json.loads(capfd.readouterr().out)
    assert answer["ok"] is False
    assert answer["checks"][0] == {"name": "memory", "level": "fault", "found": "1 GiB", "mend": "Buy more."}
