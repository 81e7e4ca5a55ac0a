"""benchmarks/ingest.py in a tiny configuration: it runs, and its ratios are what they say."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.testing.shards import make_dataset


@pytest.fixture
def ingest(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import ingest

    return ingest


@contextlib.contextmanager
def in_a_thread(serve: Any, group: str, names: Any, settings: Any) -> Iterator[Any]:
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, group, settings), daemon=True)
    thread.start()

    def ask(question: tuple[str, str]) -> Any:
        ours.send(question)
        answer = ours.recv()
        assert not isinstance(answer, str), answer
        return answer

    yield names, ask
    ours.close()
    thread.join(timeout=10)


@pytest.mark.slow  # starts Ray, an S3 server and worker processes
def test_tiny_run(ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there = importlib.util.find_spec("webdataset") is not None
    out = tmp_path / "out.json"
    arguments = ["--images", "16", "--batch", "4", "--size", "32", "--rounds", "1", "--workers", "1", "--no-s3"]
    only = ["--only", "bare_loop", "ours", "webdataset_tensor"]
    monkeypatch.setattr(
        ingest, "_host", functools.partial(in_a_thread, ingest._serve)
    )  # processes take seconds to start
    monkeypatch.setattr(sys, "argv", ["ingest.py", *arguments, "--no-wait", *only, "--json", str(out)])
    ingest.main()
    figures = json.loads(out.read_text())
    assert figures["images"] == 16 and 30_000 < figures["bytes_per_image"] < 150_000
    own, floor = (figures[f"local_{who}_cpu_s_per_image"] for who in ("ours", "bare_loop"))
    assert figures["ratio_vs_bare_loop"] == pytest.approx(floor / own, abs=0.01)
    assert ("ratio_vs_webdataset" in figures) == there
    said = capsys.readouterr().out
    assert "The floor for an image is" in said and ("Left out: webdataset" in said) != there


def test_contenders_that_give_other_pixels_are_noticed(ingest) -> None:
    ingest._compare({"one": 0.12, "two": 0.13})
    with pytest.raises(RuntimeError, match="not give the same pixels"):
        ingest._compare({"one": 0.12, "two": 0.62})


def test_ratios_take_webdatasets_better_way(ingest) -> None:
    cost = {
        "ours": 1.0,
        "webdataset_pil": 3.0,
        "webdataset_tensor": 2.0,
        "webdataset_our_decoder": 1.5,
        "bare_loop": 0.9,
    }
    cost |= {"ours_on_ray": 2.0, "ray_read_webdataset": 5.0}
    found = ingest._ratios({f"local_{name}_cpu_s_per_image": value for name, value in cost.items()})
    expected = {
        "ratio_vs_webdataset": 2.0, "ratio_vs_webdataset_same_decoder": 1.5, "ratio_vs_bare_loop": 0.9,
        "ray_ratio_vs_webdataset": 1.0, "ray_ratio_vs_webdataset_same_decoder": 0.75, "ray_ratio_vs_bare_loop": 0.45,
        "ratio_vs_ray_read_webdataset": 2.5,
    }  # fmt: skip
    assert found == {**expected, **{f"local_{name}": value for name, value in expected.items()}}


def test_the_floor_on_several_processes_is_the_same_loop(ingest, tmp_path: Path) -> None:
    import _contenders

    data = make_dataset(tmp_path / "data", 12, per_shard=4)
    setting = ingest._setting(tmp_path, argparse.Namespace(data=str(data), images=12, batch=6, size=32, workers=2))
    # The same sum in the same order on both sides: whose mean is near zero would differ by its rounding.
    alone = [pixels.numpy()[0, :, ::16, ::16].mean() for pixels in _contenders.bare_alone(setting)()]
    together = [mean for means in _contenders.bare(setting)() for mean in means[:, 0, 0, 0].tolist()]
    assert len(set(together)) == 12 and sorted(together) == sorted(map(float, alone))


def test_drawn_photographs_are_the_same_every_time(ingest) -> None:
    from _photos import photo

    assert photo(3) == photo(3) != photo(4)


def test_tars_of_ones_own_are_taken_whole_until_there_are_enough(ingest, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", 20, per_shard=4)
    options = argparse.Namespace(data=str(data), images=10, batch=5, size=32, workers=1)
    setting = ingest._setting(tmp_path, options)
    assert [Path(shard).name for shard in setting.shards] == [f"shard-{n:05d}.tar" for n in range(3)]
    assert setting.images == 10 and not list(data.glob("manifest*"))
    with pytest.raises(SystemExit, match="no local folder with tars"):
        ingest._setting(tmp_path, argparse.Namespace(**{**vars(options), "data": str(tmp_path / "index")}))
