"""The page of a data set: its figures and pictures are the data's, its text is text, and it loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from isthmus import cli
from isthmus.data.manifest import index
from isthmus.data.stats import data_stats
from isthmus.pipeline import dataset
from isthmus.pipeline.plots import histogram
from isthmus.testing.shards import image_bytes, write_tar


@pytest.fixture
def data(tmp_path: Path) -> str:
    members: dict[str, bytes] = {}
    for n in range(6):
        members |= {f"k{n}.png": image_bytes(n), f"k{n}.txt": b"<script>alert(1)</script> & <b>bold</b>"}
    members |= {"<i>.png": b"not an image", "<i>.txt": b"broken " * 100}
    write_tar(tmp_path / "set" / "x.tar", members)
    index(str(tmp_path / "set"))
    return str(tmp_path / "set")


def test_the_page_shows_figures_plots_and_pictures(tmp_path: Path, data: str) -> None:
    stats, values = data_stats(data)
    dataset.write_page(str(tmp_path / "out" / "page.html"), stats, values)
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 7 and page.count("data:image/webp;base64,") == 6
    assert page.count("<svg") == 6, "captions, captions of a sample, size, aspect, formats, bytes"
    assert "Of 7 samples drawn with seed 0, which is all of them" in page
    assert "no image format that is known" in page and page.count("broken") < 60, "long captions are cut"
    assert stats.digest in page and page.count('class="tile missed"') == 1


def test_captions_and_keys_are_text_and_the_page_loads_nothing(tmp_path: Path, data: str) -> None:
    dataset.write_page(str(tmp_path / "page.html"), *data_stats(data))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>bold" not in page and "<i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold" in page and "&lt;i&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page) and not re.search(r"url\((?!#)", page)


def test_the_sheet_is_bounded(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CARDS", 3)
    dataset.write_page(str(tmp_path / "page.html"), *data_stats(data))
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<figure>") == 3


def test_the_command_prints_figures_and_writes_the_page(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "stats", data, "--json", "--sample", "4", "--seed", "3", "--out", str(tmp_path / "p.html")])
    said = json.loads(capfd.readouterr().out)
    assert not ended.value.code and (said["samples"], said["looked_at"], said["seed"]) == (7, 4, 3)
    assert said["page"] == str(tmp_path / "p.html") and (tmp_path / "p.html").is_file()
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "stats", str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "nothing at" in capfd.readouterr().err


@pytest.mark.parametrize("values", [[], [5.0], [1.0, 1.0], [1.0, 1000.0], [0.25, 0.5], list(range(3, 90))])
@pytest.mark.parametrize("log", [False, True])
def test_histograms_of_few_and_of_equal_values(values: list[float], log: bool) -> None:
    svg = histogram("title", {"one": values, "none": []}, "unit", log=log)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
