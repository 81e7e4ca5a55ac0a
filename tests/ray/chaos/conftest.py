"""The report of the chaos tests, and the ground that they share: data, and a run that nothing disturbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import account
import chaos_method
from chaos_help import Report, judge

from isthmus.data.manifest import index
from isthmus.methods import METHODS
from isthmus.testing.shards import make_dataset
from isthmus.training.driver import fit

ROWS = pytest.StashKey[list[dict[str, Any]]]()
SAMPLES = 30
"""Batches of eight: an epoch of four steps, the last one padded."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-report", help="file for what became of every fault, JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    names = [name for mark in item.iter_markers("fault") for name in mark.args]
    if report.failed and names:
        why = str(report.longrepr).splitlines()[-1][:300]
        known = {row["fault"] for row in item.config.stash[ROWS]}
        for row in item.config.stash[ROWS]:  # whatever the test found wrong behind its row
            if row["fault"] in names:
                row |= {"survived": False, "note": why}
        item.config.stash[ROWS] += [
            {"fault": name, "survived": False, "lost": None, "doubled": None, "silent": None, "recovery_s": None,
             "note": why}
            for name in names if name not in known
        ]  # fmt: skip
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash.get(ROWS, [])
    path = session.config.getoption("--chaos-report", default=None)
    if path and rows:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("fault", "survived", "lost", "doubled", "silent", "recovery s", "steps again", "note")
    for row in rows:
        shown = [row.get(name) for name in ("lost", "doubled", "silent", "recovery_s", "lost_steps")]
        cells = ["-" if value is None else str(value) for value in shown]
        table.add_row(row["fault"], "yes" if row["survived"] else "NO", *cells, row.get("note", ""))
    Console(width=160).print(table)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    return Report(request.config.stash[ROWS])


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with indexed data; the method is known for the session."""
    root = tmp_path_factory.mktemp("chaos")
    index(str(make_dataset(root / "data", SAMPLES)))
    METHODS["chaos"] = chaos_method.SPEC
    yield root
    del METHODS["chaos"]


@pytest.fixture(scope="session")
def control(ground: Path, ray_cluster: Any) -> str:
    """The name of a run that nothing disturbed; its own account is in order."""
    fit(chaos_method.recipe(ground, "control"), progress=False)
    found = judge(ground, "control")
    assert found == account.Account(0, 0, 0, 0)
    return "control"
