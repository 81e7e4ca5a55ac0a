"""The comparison: its figures are the steps' own, what is missing is named, and the page stands alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.errors import ConfigError, DataError
from isthmus.pipeline.compare import CompareOptions, write_comparison
from isthmus.pipeline.engine import load_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FILES = ("report.json", "report.html", "report.md", "plots/quality.svg", "plots/quality-by-seconds.svg")


def trained(**changes: Any) -> dict[str, Any]:
    facts = {
        "uri": "models:/a/1", "run": "runs/a", "method": "projector", "steps": 40, "global_batch": 128,
        "samples_seen": 5120, "seed": 0, "seconds": 61.5, "stepping_seconds": 40.25, "trainable_parameters": 1_234_567,
        "peak_memory_gib": 0.91, "step_seconds": 3.0,
    }  # fmt: skip
    return facts | changes


def evaluated(tr: float, ir: float, **changes: Any) -> dict[str, Any]:
    recalls = {f"{way}_at_{k}": min(1.0, value * k) for way, value in (("tr", tr), ("ir", ir)) for k in (1, 5, 10)}
    chance = {f"{way}_at_{k}_chance": k / 600 for way in ("tr", "ir") for k in (1, 5, 10)}
    facts = {"images": 600, "captions": 600, "rerank": 0, "data_digest": "d" * 64, "step_seconds": 9.0, "cka": 0.25}
    intervals = {f"{name}_ci95": [value - 0.02, value + 0.03] for name, value in recalls.items()}
    return {**recalls, **chance, **intervals, **facts, **changes}


def results() -> dict[str, dict[str, Any]]:
    return {
        "projector": trained(),
        "projector-eval": evaluated(0.095, 0.1),
        "stage1": trained(uri="models:/b/2", seconds=200.0, trainable_parameters=22_000_000),
        "stage1-eval": evaluated(0.05, 0.06),
        "shuffled": trained(uri="models:/c/1"),
        "shuffled-eval": evaluated(1 / 600, 2 / 600),
    }


def options(**changes: Any) -> CompareOptions:
    rows = [
        {"method": "projector", "train": "projector", "evaluate": "projector-eval", "about": "two <b>MLPs</b>"},
        {"method": "stage 1", "train": "stage1", "evaluate": "stage1-eval", "kind": "baseline"},
        {"method": "shuffled", "train": "shuffled", "evaluate": "shuffled-eval", "kind": "control"},
    ]
    return CompareOptions.model_validate({"title": "All methods", "rows": rows} | changes)


def written(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
    write_comparison(folder, given or results(), options(**changes))
    return json.loads((folder / "report.json").read_text())


def test_each_row_is_an_object_of_the_steps_own_figures(tmp_path: Path) -> None:
    rows = written(tmp_path)
    assert [(row["method"], row["kind"]) for row in rows] == [
        ("projector", "method"), ("stage 1", "baseline"), ("shuffled", "control")
    ]  # fmt: skip
    wanted = {
        "tr_r1": 0.095, "ir_r1": 0.1, "tr_r5": 0.475, "ir_r5": 0.5, "tr_r10": 0.95, "ir_r10": 1.0,
        "chance_r1": 1 / 600, "images": 600, "seconds": 61.5, "stepping_seconds": 40.25, "evaluation_seconds": 9.0,
        "trainable_parameters": 1_234_567, "peak_memory_gib": 0.91, "steps": 40, "global_batch": 128,
        "samples_seen": 5120, "seed": 0, "uri": "models:/a/1",
    }  # fmt: skip
    assert {name: rows[0][name] for name in wanted} == wanted
    assert (rows[1]["seconds"], rows[1]["trainable_parameters"], rows[2]["ir_r1"]) == (200.0, 22_000_000, 2 / 600)
    assert all((tmp_path / name).stat().st_size > 100 for name in FILES)


def test_chance_is_the_easier_way_s(tmp_path: Path) -> None:
    given = results()
    for name in given:
        if name.endswith("-eval"):
            given[name]["tr_at_1_chance"] = 5 / 600
    assert written(tmp_path, given)[0]["chance_r1"] == 5 / 600


def test_intervals_are_the_evaluation_s(tmp_path: Path) -> None:
    rows = written(tmp_path)
    assert rows[0]["tr_r1_interval"] == [0.075, 0.125] and "chance_r1_interval" not in rows[0]


def test_further_columns_come_from_either_step(tmp_path: Path) -> None:
    rows = written(tmp_path, columns={"cka": "evaluate.cka", "recipe": "train.method"}, table=["tr_r1", "cka"])
    assert [(row["cka"], row["recipe"]) for row in rows] == [(0.25, "projector")] * 3
    assert "| projector | method | 9.5 ± 2.5 | 0.25 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("step", "key", "value"),
    [("stage1", "trainable_parameters", None), ("stage1-eval", "ir_at_5", None), ("shuffled", "seconds", float("nan"))],
)
def test_a_missing_figure_names_its_step_and_nothing_is_written(
    tmp_path: Path, step: str, key: str, value: float | None
) -> None:
    given = results()
    given[step][key] = value
    with pytest.raises(DataError, match=f"Step '{step}' gives .*'{key}'"):
        written(tmp_path, given)
    assert not list(tmp_path.iterdir())


def test_a_step_that_has_not_run_is_named_with_its_neighbour(tmp_path: Path) -> None:
    given = results()
    del given["stage1-eval"]
    with pytest.raises(ConfigError, match=r"'stage 1' looks at the step 'stage1-eval', which has not run\. Did you"):
        written(tmp_path, given)


def test_rows_on_different_data_are_refused(tmp_path: Path) -> None:
    given = results()
    given["shuffled-eval"]["data_digest"] = "e" * 64
    with pytest.raises(DataError, match="'shuffled-eval' measured 'shuffled' on other data than step 'projector-eval'"):
        written(tmp_path, given)


def test_rows_on_other_counts_of_images_are_refused(tmp_path: Path) -> None:
    given = results()
    given["stage1-eval"]["images"] = 50
    with pytest.raises(
        DataError, match="'stage1-eval' measured 'stage 1' on 50 images, and step 'projector-eval' on 600"
    ):
        written(tmp_path, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"cka": "cka"}}, "expected train.FIELD or evaluate.FIELD"),
        ({"table": ["tr_r2"]}, "no figure is called 'tr_r2'. Did you mean"),
        ({"rows": [{"method": "a", "train": "x", "evaluate": "y"}] * 2}, "two rows are called 'a'"),
    ],
)
def test_a_wrong_section_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**change)


def test_a_row_that_names_no_earlier_step_is_found_before_anything_runs(tmp_path: Path) -> None:
    compare = {"title": "t", "rows": [{"method": "a", "train": "train-a", "evaluate": "eval-a"}]}
    steps = [
        {"id": "train-a", "run": "train"},
        {"id": "evala", "run": "evaluate"},
        {"id": "compare", "run": "compare", "options": compare},
    ]
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump({"name": "p", "out": "o", "steps": steps}))
    with pytest.raises(ConfigError, match=r"'a' names 'eval-a' in 'evaluate'.*Did you mean 'evala'"):
        load_pipeline(file)


def test_the_table_is_shown_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    shown = capsys.readouterr()
    assert shown.out == "" and "All methods" in shown.err and "1.23 M" in shown.err and "9.5 ± 2.5" in shown.err


def test_the_page_escapes_text_and_loads_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 and "two &lt;b&gt;MLPs&lt;/b&gt;" in page
    assert "9.5 ± 2.5" in page and "models:/b/2" in page
    assert "<script" not in page and 'src="http' not in page and not re.search(r"url\((?!#)", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_a_browser_shows_the_plots_without_asking_anybody_or_scrolling_sideways(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    written(tmp_path)
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
            page.goto((tmp_path / "report.html").as_uri())
            drawn = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().width)")
            overhang = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert len(drawn) == 3 and min(drawn) > 200 and overhang <= 0
        browser.close()
    assert set(asked) <= {"file", "data"}
