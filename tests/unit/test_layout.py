"""The repository's shape: what must not exist, what must agree, and that the project speaks of itself alone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import isthmus

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository here")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_platform_is_a_source_root_and_shadows_nothing() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    code = "import platform; assert platform.python_version(), platform"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_job_entry_points_are_thin_and_start() -> None:
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert {j.stem for j in jobs} == {"train", "caption", "evaluate", "embed", "serve", "pipeline", "data", "align"}
    for job in jobs:
        assert len(job.read_text(encoding="utf-8").splitlines()) <= 40, job
    ran = subprocess.run([sys.executable, jobs[0], "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage: isthmus" in ran.stdout


def test_constraints_cover_the_dependencies_with_plain_versions() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert not [v for v in pins.values() if "+" in v], "a local suffix ties the pin to one machine's wheels"
    assert not [n for n in pins if n.startswith("nvidia") or n == "triton"]
    asked = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in asked}
    assert names - set(pins) == set()


def test_every_direct_import_is_a_declared_dependency() -> None:
    distribution = {"yaml": "pyyaml", "PIL": "pillow", "gguf": "gguf"}
    asked = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    declared = {re.split(r"[\[<>=~! ]", line)[0].lower().replace("-", "_") for line in asked}
    imported: dict[str, Path] = {}
    for file in (ROOT / "platform").rglob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) ([A-Za-z_0-9]+)", _code(file), flags=re.M):
            imported.setdefault(name, file)
    ours = set(sys.stdlib_module_names) | {"isthmus"}
    missing = {
        n: str(f) for n, f in imported.items() if n not in ours and distribution.get(n, n.lower()) not in declared
    }
    assert missing == {}


def test_version_is_said_once_and_dated_in_the_changelog() -> None:
    assert f"## {isthmus.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["dynamic"] == ["version"]


def test_make_targets_that_people_are_told_of_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "demo-long", "test", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for word in re.findall(r"`make ([a-z-]+)`", (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{word}:", makefile, flags=re.M), word


def test_make_refuses_an_old_python_with_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\necho "Isthmus needs Python 3.11 or newer" >&2; exit 1\n')
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode != 0
    assert "needs Python 3.11" in made.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_lint_and_tests_and_stops_at_the_first_failure() -> None:
    script = ROOT / ".ci/run"
    text = script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make lint\nmake test")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_no_file_names_the_machine_it_was_written_on() -> None:
    home = re.compile(r"/(?:work|root|opt/wheels|Users)/|/home/(?!ray/|ubuntu/|mlflow|\$)")
    found = []
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".html"} or path.name == "Makefile":
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in home.finditer(text) if path.name != "test_layout.py"]
    assert found == []


def _code(file: Path) -> str:
    """The file without docstrings, in which a line may begin with 'from'."""
    return re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.S)


def test_processes_that_share_the_suite_keep_a_file_together(request: pytest.FixtureRequest) -> None:
    if not hasattr(request.config, "workerinput"):
        pytest.skip("one process runs the suite")
    assert request.node.nodeid.endswith("@tests/unit/test_layout.py"), "fixtures would be made once in each process"
