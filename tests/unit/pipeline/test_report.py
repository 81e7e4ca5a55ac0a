"""The report: its figures are the steps' own, its verdicts follow the aims, and the page stands alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isthmus.data.manifest import index
from isthmus.pipeline.report import write_report
from isthmus.pipeline.steps import ReportOptions
from isthmus.testing.shards import make_dataset

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEYS = [f"s{n:05d}" for n in range(12)]
CHANCE = {f"{way}_at_{k}_chance": k / 600 for way in ("tr", "ir") for k in (1, 5, 10)}


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = make_dataset(tmp_path / "heldout", len(KEYS))
    index(str(folder))
    return str(folder)


def recalls(tr5: float, ir5: float) -> dict[str, float]:
    values = {"tr_at_5": tr5, "ir_at_5": ir5}
    return {f"{way}_at_{k}": values.get(f"{way}_at_{k}", 0.1) for way in ("tr", "ir") for k in (1, 5, 10)} | CHANCE


def results(folder: Path, tr5: float = 0.3, ir5: float = 0.2, cider: float = 0.5) -> dict[str, dict[str, Any]]:
    for step in ("retrieval", "scores"):
        (folder / step).mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "key": KEYS,
                "captions": [[f"<b>caption</b> {n}"] for n in range(12)],
                "ir_ranks": [[n + 1] for n in range(12)],
                "top_images": [[KEYS[n], *KEYS[:4]] for n in range(12)],
            }
        ),
        folder / "retrieval" / "rows.parquet",
    )
    pq.write_table(
        pa.table({"key": KEYS, "caption": ["a red star"] * 12, "references": [["a star"]] * 12}),
        folder / "scores" / "rows.parquet",
    )
    run = folder / "stage1"
    run.mkdir()
    rows = [{"step": s, "metrics": {"loss": 5 - s / 10, "loss_itc": 4 - s / 10}} for s in (1, 10, 20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "references.json").write_text(json.dumps({"loss_itc.chance": 4.85, "loss_itc.floor": 0.8}))
    steps: dict[str, dict[str, Any]] = {
        "stage1": {"run": str(run), "uri": "models:/demo-stage1/3"},
        "retrieval": {**recalls(tr5, ir5), "images": 600, "out": str(folder / "retrieval")},
        "projector": {**recalls(0.4, 0.41), "images": 600},
        "caption": {"captioned": 598, "expected": 600, "quarantined": 2, "out": "captions"},
        "scores": {"cider": cider, "cider_permuted": 0.2, "out": str(folder / "scores")},
        "serve": {"key": KEYS[3], "answer": "a <script>", "answer_seconds": 0.4, "reference": "star"},
    }
    return {name: {**step, "step_seconds": 10.0} for name, step in steps.items()}


def options(data: str) -> ReportOptions:
    return ReportOptions(
        data=data, retrieval="retrieval", projector="projector", captions="caption", scores="scores",
        serve="serve", trained=("stage1",), seed=7,
    )  # fmt: skip


def test_the_figures_for_machines_are_the_steps_own(tmp_path: Path, data: str) -> None:
    write_report(tmp_path, results(tmp_path), options(data))
    figures = json.loads((tmp_path / "report.json").read_text())
    wanted = {
        "retrieval_images": 600, "tr_r5": 0.3, "ir_r5": 0.2, "projector_tr_r5": 0.4, "projector_ir_r5": 0.41,
        "chance_r5": 5 / 600, "cider": 0.5, "cider_permuted": 0.2, "captioned": 598, "expected": 600,
        "seconds": 60.0, "seed": 7,
    }  # fmt: skip
    assert {name: figures[name] for name in wanted} == wanted


def test_the_page_shows_curves_pictures_and_versions_and_loads_nothing(tmp_path: Path, data: str) -> None:
    write_report(tmp_path, results(tmp_path), options(data))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 12 and page.count("data:image/webp") >= 12 + 6 * 5 + 1
    assert "chance" in page and "4.85" not in page.split("<svg")[0]
    assert "a &lt;script&gt;" in page and "<script" not in page, "what a model says is text, never markup"
    assert "<b>caption</b>" not in page
    assert 'src="http' not in page and not re.search(r"url\((?!#)", page)
    assert "http://127.0.0.1:5000/#/models/demo-stage1/versions/3" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_picture_without_asking_anybody(tmp_path: Path, data: str, width: int) -> None:
    from playwright.sync_api import sync_playwright

    write_report(tmp_path, results(tmp_path), options(data))
    complaints: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        page.goto((tmp_path / "report.html").as_uri())
        drawn = page.eval_on_selector_all("img, svg", "all => all.map(one => one.getBoundingClientRect().width)")
        decoded = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
        overhang = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        browser.close()
    assert min(drawn) > 20 and min(decoded) > 0 and len(decoded) >= 12 + 6 * 5 + 1
    assert overhang <= 0, "the page scrolls sideways"
    assert complaints == [] and set(asked) <= {"file", "data"}


@pytest.mark.parametrize(
    ("change", "missed"), [({}, 0), ({"tr5": 0.05}, 1), ({"ir5": 0.05}, 1), ({"tr5": 0.05, "cider": 0.39}, 2)]
)
def test_an_aim_that_is_missed_is_shown_as_missed(
    tmp_path: Path, data: str, change: dict[str, float], missed: int
) -> None:
    write_report(tmp_path, results(tmp_path, **change), options(data))
    assert (tmp_path / "report.html").read_text().count('class="tile missed"') == missed


def test_images_that_are_unaccounted_for_are_shown(tmp_path: Path, data: str) -> None:
    steps = results(tmp_path)
    steps["caption"]["captioned"] = 597
    write_report(tmp_path, steps, options(data))
    assert (tmp_path / "report.html").read_text().count('class="tile missed"') == 1
