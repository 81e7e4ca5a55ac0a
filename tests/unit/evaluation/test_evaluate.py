"""A whole evaluation with a stand-in model over real shards: figures, facts, files, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.contracts import ModelVersion, StageModule
from isthmus.data.manifest import Manifest, index
from isthmus.data.transforms import ImageTransform
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.driver import evaluate
from isthmus.evaluation.model import Loaded
from isthmus.inference.caption import CaptionWork
from isthmus.inference.commits import Job, Ledger, chunks
from isthmus.inference.embed import EmbedWork
from isthmus.inference.engine import Engine, Generation
from isthmus.testing.shards import image_bytes, make_dataset, write_tar

TRANSFORM = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
COUNT = 10


class Oracle(StageModule):
    """Knows the images by their mean colour, which is how a caption's number is found again."""

    def __init__(self, known: dict[tuple[float, ...], str]) -> None:
        super().__init__()
        self.known = known
        self.texts = sorted(known.values())

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.mean(dim=(2, 3)).unsqueeze(1)

    def generate(self, features_BND: Tensor, **how: Any) -> list[str]:
        return [f" {self._name(row)} " for row in features_BND]

    def embed_images(self, features_BND: Tensor) -> Tensor:
        rows = [self.texts.index(self._name(row)) for row in features_BND]
        return torch.nn.functional.one_hot(torch.tensor(rows), len(self.texts)).float().unsqueeze(1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [self.texts.index(text) if text in self.texts else 0 for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(rows), len(self.texts)).float()

    def match(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(self._name(f) == t) for f, t in zip(features_BND, texts, strict=True)])

    def _name(self, features_ND: Tensor) -> str:
        return self.known[tuple(round(v, 4) for v in features_ND[0].tolist())]


class Mute(StageModule):
    """Can do nothing."""


def oracle(data: Path) -> Oracle:
    from isthmus.data.readers import RawSample, read_rows
    from isthmus.data.transforms import decode_image

    manifest, known = Manifest.load(str(data)), {}
    for sample in read_rows(manifest, range(len(manifest))):
        assert isinstance(sample, RawSample)
        pixels = torch.from_numpy(TRANSFORM(decode_image(sample.image)))
        known[tuple(round(v, 4) for v in pixels.mean(dim=(1, 2)).tolist())] = sample.captions[0]
    return Oracle(known)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_dataset(tmp_path / "heldout", COUNT, per_shard=4)
    index(str(folder))
    return folder


@pytest.fixture
def loaded(data: Path) -> Loaded:
    version = ModelVersion("", "", "", "stand-in", "", {})
    return Loaded(version, oracle(data).eval(), TRANSFORM)  # type: ignore[arg-type]


def config(data: Path, **options: Any) -> EvaluateConfig:
    return EvaluateConfig(model="stand-in", data=str(data), batch=4, **options)


def test_an_oracle_is_perfect_and_its_permuted_captions_are_not(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    result = evaluate(config(data, tasks=("retrieval", "captioning"), out=str(out)), loaded=loaded)
    assert (result["tr_at_1"], result["ir_at_1"]) == (1.0, 1.0)
    assert result["tr_at_1_chance"] == pytest.approx(1 / COUNT)
    assert result["bleu_4"] == pytest.approx(0.0, abs=1e-3) or result["bleu_1"] == pytest.approx(1.0)
    assert result["cider_permuted"] < result["cider"]
    assert (result["images"], result["captioned"], result["references"], result["unreadable"]) == (10, 10, 20, 0)
    assert result["comparable_to_paper"] is False
    assert result["split"] == "heldout" and result["captions_per_image"] == "first"
    assert result["ties"].startswith("pessimistic")
    assert json.loads((out / "metrics.json").read_text()) == result
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    assert len(rows) == COUNT and {r["tr_rank"] for r in rows} == {1}
    assert all(r["caption"] != r["permuted_caption"] for r in rows)


def test_all_captions_of_an_image_are_its_positives(data: Path, loaded: Loaded) -> None:
    result = evaluate(config(data, captions_per_image="all"), loaded=loaded)
    assert (result["images"], result["captions"]) == (10, 20)
    # Second captions all look like those of one image: they tie with its main one, and ties count against it.
    assert result["tr_at_1"] == 0.9
    assert result["ir_at_1"] == 0.55  # ten main captions and that one image's second


def test_reranking_asks_the_matching_head(data: Path, loaded: Loaded) -> None:
    assert evaluate(config(data, rerank=3), loaded=loaded)["tr_at_1"] == 1.0


def test_limit_and_repeatability(data: Path, loaded: Loaded) -> None:
    first = evaluate(config(data, tasks=("captioning",), limit=6), loaded=loaded)
    assert first["samples"] == first["captioned"] == 6
    assert first == evaluate(config(data, tasks=("captioning",), limit=6), loaded=loaded)


def test_a_task_the_method_cannot_do_is_refused(data: Path, loaded: Loaded) -> None:
    mute = Loaded(loaded.version, Mute(), TRANSFORM)
    with pytest.raises(ConfigError, match="stand-in cannot do retrieval: its method implements no Embeds"):
        evaluate(config(data), loaded=mute)
    with pytest.raises(ConfigError, match="no Captions"):
        evaluate(config(data, tasks=("captioning",)), loaded=mute)


def bulk(data: Path, out: Path, module: StageModule, *, close: bool = True) -> None:
    """What a captioning job leaves behind, made in this process."""
    manifest = Manifest.load(str(data))
    ledger = Ledger(str(out), Job("caption", {"manifest": manifest.digest, "prompt": "", "num_beams": 2}))
    ledger.open()
    work = CaptionWork(Engine(module, TRANSFORM, "models:/x/1"), manifest, None, 3, Generation())
    plan = chunks(len(manifest), 4)
    for chunk in plan:
        done = work.process(range(chunk.start, chunk.stop))
        ledger.commit(chunk, done.table, done.quarantined)
    _, aside = ledger.reconcile(plan, manifest.ids)
    if close:
        ledger.close(aside, {"expected": len(manifest)})


def test_bulk_captions_are_scored_as_they_were_written(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    bulk(data, tmp_path / "captions", loaded.module)
    written = evaluate(config(data, tasks=("captioning",), captions=str(tmp_path / "captions")), loaded=loaded)
    generated = evaluate(config(data, tasks=("captioning",)), loaded=loaded)
    assert written["cider"] == generated["cider"]
    assert (written["num_beams"], written["captions_model"]) == (2, "models:/x/1")


def test_unfinished_or_foreign_bulk_captions_are_refused(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    bulk(data, tmp_path / "half", loaded.module, close=False)
    with pytest.raises(DataError, match="unfinished"):
        evaluate(config(data, tasks=("captioning",), captions=str(tmp_path / "half")), loaded=loaded)
    bulk(data, tmp_path / "captions", loaded.module)
    other = make_dataset(tmp_path / "other", 5, start=50)
    index(str(other))
    with pytest.raises(DataError, match="of other data"):
        evaluate(config(other, tasks=("captioning",), captions=str(tmp_path / "captions")), loaded=loaded)


def test_a_quarantined_image_is_not_scored_and_is_counted(loaded: Loaded, data: Path, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "spoilt", COUNT, per_shard=COUNT)
    broken = image_bytes(77)[:60]
    write_tar(folder / "z.tar", {"bad.png": broken, "bad.txt": b"a broken picture"})
    index(str(folder))
    result = evaluate(config(folder), loaded=loaded)
    assert (result["images"], result["unreadable"], result["samples"]) == (COUNT, 1, COUNT + 1)
    bulk(folder, tmp_path / "captions", loaded.module)
    result = evaluate(config(folder, tasks=("captioning",), captions=str(tmp_path / "captions")), loaded=loaded)
    assert result["captioned"] == COUNT
    aside = pq.read_table(tmp_path / "captions" / "quarantine.parquet").to_pylist()
    assert [(q["key"], q["shard"], len(q["digest"])) for q in aside] == [("bad", "z.tar", 64)]


def test_embeddings_of_images_and_of_every_caption(data: Path, loaded: Loaded) -> None:
    manifest = Manifest.load(str(data))
    engine = Engine(loaded.module, TRANSFORM, "models:/x/1")
    done = EmbedWork(engine, manifest, None, 3, images=True, texts=True).process(range(2, 7))
    assert done.table["id"].to_pylist() == manifest.ids[2:7].tolist()
    vectors, texts = done.table["embeddings"].to_pylist(), done.extras["texts"].to_pylist()
    assert [(t["id"], t["caption_index"]) for t in texts[:3]] == [
        (manifest.ids[2], 0),
        (manifest.ids[2], 1),
        (manifest.ids[3], 0),
    ]
    assert [v[0] for v in vectors] == [t["embedding"] for t in texts if t["caption_index"] == 0]
    only = EmbedWork(engine, manifest, None, 3, images=False, texts=True).process(range(2))
    assert only.table["embeddings"].to_pylist() == [None, None] and only.extras["texts"].num_rows == 4
