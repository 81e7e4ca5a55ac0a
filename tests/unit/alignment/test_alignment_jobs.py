"""Selecting encoders and curating pairs: whole runs, resumed, and equal to doing it plainly. Without a cluster here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from isthmus.alignment.cka import linear_cka
from isthmus.alignment.curate import CHOICE, CurateReport, _space_warning, curate
from isthmus.alignment.features import CaptionEncoder, cut_warning
from isthmus.alignment.prototypes import Prototypes, prototypes
from isthmus.alignment.select import select
from isthmus.alignment.topk import Collector, assign
from isthmus.alignment.vectors import DECIMALS
from isthmus.config import CurateConfig, PrototypesConfig, SelectConfig, TextConfig
from isthmus.data import encode
from isthmus.data.features import FeatureCache
from isthmus.data.manifest import Manifest, index
from isthmus.data.subset import write_subset
from isthmus.errors import DataError
from isthmus.inference import bulk
from isthmus.inference.commits import Chunk, Ledger
from isthmus.pipeline.alignment import write_curation_page, write_select_page
from isthmus.testing.backbones import tiny_bert, tiny_vision_config
from isthmus.testing.shards import image_bytes, write_tar

CLASSES = ("cat", "dog", "tree", "moon")
SAMPLES = 36


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a pool of actors, which has tests of its own."""

    def run(left: list[Chunk], ledger: Ledger, open_work: Callable[[], Any], *_: Any) -> None:
        work = open_work()
        for chunk in left:
            done = work.process(range(chunk.start, chunk.stop))
            ledger.commit(chunk, done.table, done.quarantined, done.extras)

    monkeypatch.setattr(bulk, "_run_chunks", run)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder, colours = tmp_path_factory.mktemp("pairs"), ("red", "green", "blue")
    for shard in range(3):
        members = {}
        for n in range(12 * shard, 12 * shard + 12):
            members[f"s{n:03d}.png"] = image_bytes(n)
            members[f"s{n:03d}.txt"] = f"a {colours[n % 3]} {CLASSES[n % 4]} of {n}\n".encode()
        write_tar(folder / f"{shard}.tar", members)
    index(str(folder))
    return Manifest.load(str(folder))


def plainly(data: Manifest, text: TextConfig, known: Prototypes, per_class: int) -> dict[int, str]:
    """Sample id -> class, by a full sort in this process."""
    colours = ("red", "green", "blue")
    said = [f"a {colours[n % 3]} {CLASSES[n % 4]} of {n}" for n in range(SAMPLES)]
    collector = Collector(len(CLASSES), SAMPLES)
    collector.add(data.ids, CaptionEncoder(text, 512)(said) @ known.vectors_KE.T)
    chosen = assign(collector.result(), len(CLASSES), per_class, per_class).chosen
    return {i: known.names[k] for i, k in zip(chosen.id_C.tolist(), chosen.class_C.tolist(), strict=True)}


def choice(report: CurateReport) -> dict[int, str]:
    table = pq.read_table(Path(report.out) / CHOICE)
    return dict(zip(table["id"].to_pylist(), table["class"].to_pylist(), strict=True))


def test_curation_is_a_full_sort_resumes_and_leaves_a_data_set(
    data: Manifest, text: TextConfig, tmp_path: Path
) -> None:
    file = str(tmp_path / "classes.parquet")
    prototypes(PrototypesConfig(out=file, text=text, classes=CLASSES))
    values = {"data": data.root, "prototypes": file, "text": text, "per_class": 5, "top": SAMPLES}
    config = CurateConfig(out=str(tmp_path / "a"), chunk=8, **values)
    report = curate(config)
    assert choice(report) == plainly(data, text, Prototypes.load(file), 5)
    assert report.samples == SAMPLES == report.chosen + report.passed_over + report.no_candidate + report.unreadable
    subset = Manifest.load(report.out)
    assert sorted(subset.ids.tolist()) == sorted(choice(report)) and subset.digest == report.digest
    assert subset.subset_of == data.digest
    assert [row.served for row in report.classes] == [1, 2, 3, 4]
    assert (report.full, report.reused_chunks) == (sum(r.taken == 5 for r in report.classes), 0)

    (tmp_path / "a" / "work" / "commits" / "000002.json").unlink()  # as if the job had died there
    again = curate(config)
    assert (again.reused_chunks, again.digest) == (4, report.digest)
    elsewhere = curate(config.model_copy(update={"out": str(tmp_path / "b"), "chunk": 36, "batch": 7}))
    assert choice(elsewhere) == choice(report) and elsewhere.digest == report.digest  # neither the cut nor the order
    with pytest.raises(DataError, match="another job"):
        curate(config.model_copy(update={"top": 20}))
    other = tiny_bert(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="different models"):
        curate(config.model_copy(update={"text": other, "out": str(tmp_path / "c")}))
    page = Path(write_curation_page(report)).read_text()
    assert "Coverage" in page and page.count("<svg") == 3 and "moon" in page
    assert json.loads((tmp_path / "a" / "curation.json").read_text())["digest"] == report.digest


def test_equal_captions_go_by_id_whatever_the_cut(text: TextConfig, tmp_path: Path) -> None:
    file = str(tmp_path / "classes.parquet")
    prototypes(PrototypesConfig(out=file, text=text, classes=CLASSES))
    said = clear_of_borders(text, Prototypes.load(file))
    members: dict[str, bytes] = {}
    for n in range(60):
        members |= {f"s{n:03d}.png": image_bytes(n), f"s{n:03d}.txt": said[n % len(said)].encode()}
    write_tar(tmp_path / "data" / "a.tar", members)
    index(str(tmp_path / "data"))
    found = []
    for chunk, batch in ((60, 512), (60, 7), (13, 512), (8, 3)):
        cut = {"out": str(tmp_path / f"{chunk}-{batch}"), "chunk": chunk, "batch": batch}
        config = CurateConfig(data=str(tmp_path / "data"), prototypes=file, text=text, top=9, per_class=4, **cut)
        found.append(choice(curate(config)))
    assert all(other == found[0] for other in found[1:]) and len(found[0]) > 8


def clear_of_borders(text: TextConfig, known: Prototypes) -> list[str]:
    """Seven captions whose scores are no rounding away from the border between two values that are kept."""
    words = [
        f"a {name}{where}" for name in CLASSES for where in ("", " on the grass", " left of a house", " and a bird")
    ]
    scores = CaptionEncoder(text, 64)(words).astype(float) @ known.vectors_KE.T.astype(float) * 10.0**DECIMALS
    clear = np.abs(np.abs(scores - np.round(scores)) - 0.5).min(1) > 0.08  # of 1e-5, where an encoder rounds by 1e-7
    chosen = [word for word, kept in zip(words, clear, strict=True) if kept][:7]
    assert len(chosen) == 7
    return chosen


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_scored(
    data: Manifest, text: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "classes.parquet")
    prototypes(PrototypesConfig(out=file, text=text, classes=CLASSES))
    monkeypatch.setattr(bulk, "_run_chunks", lambda *_: pytest.fail("it scored"))
    config = CurateConfig(data=data.root, prototypes=file, text=text, out=data.root)
    with pytest.raises(DataError, match="holds an index that is not a subset"):
        curate(config)
    write_subset(data, range(5), str(tmp_path / "hand"))
    with pytest.raises(DataError, match="that no curation of this data made"):
        curate(config.model_copy(update={"out": str(tmp_path / "hand")}))


def test_candidates_that_may_fill_a_disk_are_told() -> None:
    values = {"data": "d", "out": "o", "prototypes": "p", "vectors": "v"}
    said = _space_warning(CurateConfig(**values), 400_000_000, 2754, 256)
    assert said is not None and said.startswith("Up to 16.0 TiB of candidates")
    assert _space_warning(CurateConfig(**values, nearest=10), 400_000_000, 2754, 256) is None
    assert _space_warning(CurateConfig(**values), 100_000, 100, 65_536) is None


def test_captions_that_are_longer_than_the_encoder_reads_are_told(
    data: Manifest, text: TextConfig, tmp_path: Path
) -> None:
    file, short = str(tmp_path / "classes.parquet"), text.model_copy(update={"max_length": 4})
    assert cut_warning(data, text, 0) is None
    said = cut_warning(data, short, 0)
    assert said is not None and f"{SAMPLES} of {SAMPLES} sampled captions are longer than 4 tokens" in said
    prototypes(PrototypesConfig(out=file, text=short, classes=CLASSES))
    report = curate(CurateConfig(data=data.root, prototypes=file, text=short, out=str(tmp_path / "a"), chunk=36))
    assert report.warnings == (said,) and "longer than 4 tokens" in Path(write_curation_page(report)).read_text()


def test_selection_compares_what_the_encoders_make_and_keeps_it(
    data: Manifest, text: TextConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_bert(tmp_path / "other", seed=1, width=16)
    vit = tiny_vision_config()
    config = SelectConfig(
        data=data.root, out=str(tmp_path / "out"), vision=(vit, vit.model_copy(update={"image_size": 48})),
        text=(text, other), sample=30, permutations=3, chunk=8,
    )  # fmt: skip
    report = select(config)
    assert report.samples == 30 and len(report.pairs) == 2 * 2 * 2
    linear = [row for row in report.pairs if row.kernel == "linear"]
    assert [row.cka for row in linear] == sorted((row.cka for row in linear), reverse=True)
    assert (report.best_vision, report.best_text) == (linear[0].vision, linear[0].text)
    assert all(row.n == 30 for row in report.pairs)
    assert any("30 is less than 10 times the largest width (192)" in line for line in report.warnings)

    # The features are those of the encoders, and the value is theirs.
    caches = [FeatureCache.open(str(folder)) for folder in sorted((tmp_path / "out" / "vision").iterdir())]
    cache = next(c for c in caches if c.meta.vision["image_size"] == 32)
    assert (cache.meta.tokens, cache.meta.dtype) == (1, "float32") and len(cache) == 30
    ids = np.sort(cache.ids)
    number = {int(i): n for n, i in enumerate(data.ids)}
    said = [
        f"a {('red', 'green', 'blue')[number[i] % 3]} {CLASSES[number[i] % 4]} of {number[i]}" for i in ids.tolist()
    ]
    expected = linear_cka(cache.rows(ids)[:, 0], CaptionEncoder(text, 8)(said), debiased=True)
    row = next(r for r in linear if r.vision == "vit_tiny_patch16_224@32 (random)" and r.text == linear_text(text))
    assert row.cka == pytest.approx(expected, abs=1e-5)

    def never(*_: Any) -> None:
        raise AssertionError("features that are there were made again")

    monkeypatch.setattr(bulk, "_run_chunks", never)
    monkeypatch.setattr(encode, "_pool", never)
    assert select(config).pairs == report.pairs
    page = Path(write_select_page(report)).read_text()
    assert "without bias" in page and page.count("<svg") == 4


def linear_text(text: TextConfig) -> str:
    return text.weights.rsplit("/", 1)[-1]
