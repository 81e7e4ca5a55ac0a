"""A whole evaluation with a stand-in model over real shards: figures, facts, files, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
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
from isthmus.registry.store import client, start_run
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

    def generate(self, features_BND: Tensor, prompt: str | Sequence[str] | None = None, **how: Any) -> list[str]:
        self.how = how
        if prompt is None or isinstance(prompt, str):
            return [f" {self._name(row)} " for row in features_BND]
        return [f"{p} {self._name(row)}\n" for row, p in zip(features_BND, prompt, strict=True)]

    def embed_images(self, features_BND: Tensor) -> Tensor:
        rows = [self.texts.index(self._name(row)) for row in features_BND]
        return torch.nn.functional.one_hot(torch.tensor(rows), len(self.texts)).float().unsqueeze(1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [self.texts.index(text) if text in self.texts else 0 for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(rows), len(self.texts)).float()

    def match(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(self._name(f) == t) for f, t in zip(features_BND, texts, strict=True)])

    def match_margin(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        return 2 * self.match(features_BND, texts) - 1

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
    return EvaluateConfig(model="stand-in", data=str(data), batch=4, **{"meteor": False, **options})


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


@pytest.mark.parametrize(("asked", "each"), [(1, 1), (2, 2), (3, 3), (9, 3), ("first", 1), ("all", 3)])
def test_the_first_n_captions_of_an_image_take_part(tmp_path: Path, asked: int | str, each: int) -> None:
    members: dict[str, bytes] = {}
    for n in range(4):
        members |= {f"s{n}.png": image_bytes(n), f"s{n}.txt": f"main {n}\nsecond {n}\nthird {n}\n".encode()}
    write_tar(tmp_path / "d" / "a.tar", members)
    index(str(tmp_path / "d"))
    loaded = Loaded(ModelVersion("", "", "", "stand-in"), oracle(tmp_path / "d"), TRANSFORM)
    out = tmp_path / "out"
    result = evaluate(config(tmp_path / "d", captions_per_image=asked, out=str(out)), loaded=loaded)
    assert (result["captions"], result["captions_per_image"]) == (4 * each, asked)
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    said = [f"{which} 0" for which in ("main", "second", "third")][:each]
    assert next(row for row in rows if row["key"] == "s0")["captions"] == said


@pytest.mark.parametrize("asked", [0, -1, "second", 1.5, None])
def test_other_numbers_of_captions_are_refused(asked: Any) -> None:
    with pytest.raises(ValidationError, match="captions_per_image"):
        EvaluateConfig(model="m", data="d", captions_per_image=asked)


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


# ------------------------------------------------------------------------------------------------ further tasks


def described(folder: Path, extras: Sequence[dict[str, Any]]) -> Path:
    """A data set whose samples' JSON says more of the images."""
    members: dict[str, bytes] = {}
    for number, more in enumerate(extras):
        members[f"s{number}.png"] = image_bytes(number)
        members[f"s{number}.txt"] = f"picture number {number}".encode()
        members[f"s{number}.json"] = json.dumps(more).encode()
    write_tar(folder / "a.tar", members)
    index(str(folder))
    return folder


def scored(folder: Path, task: str, **options: Any) -> dict[str, Any]:
    model = Loaded(ModelVersion("", "", "", "stand-in"), oracle(folder).eval(), TRANSFORM)  # type: ignore[arg-type]
    return evaluate(config(folder, tasks=(task,), **options), loaded=model)


def test_questions_in_the_samples_are_answered_and_scored(tmp_path: Path) -> None:
    asked = [
        {
            "questions": [
                {"question": f"Which {n}?", "answers": [f"which {n}? picture number {n}"] * 9 + ["no"]},
                {"question": "Other?", "answers": ["yes"] * 9 + ["no"], "question_type": "other"},
            ]
        }
        for n in range(5)
    ]
    folder = described(tmp_path / "qa", asked)
    out = tmp_path / "out"
    result = scored(folder, "vqa", vqa={"prompt": "{}"}, out=str(out))
    # The stand-in repeats the question and names the image, which is right for one question of each pair.
    assert result["vqa_accuracy"] == pytest.approx(0.5)
    # Blind: "yes" to the five of type other, and one of the five answers that occur nine times each to the rest.
    assert result["vqa_accuracy_prior"] == pytest.approx(0.6)
    assert result["vqa_accuracy_type/other"] == 0.0
    assert (result["images"], result["questions"], result["num_beams"], result["length_penalty"]) == (5, 10, 5, -1.0)
    answers = json.loads((out / "answers.json").read_text())
    assert len({a["question_id"] for a in answers}) == 10 and answers[0]["answer"] == "which 0? picture number 0"
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    assert [row["answer_scores"] for row in rows] == [[1.0, 0.0]] * 5
    few = described(tmp_path / "few", [{"questions": [{"question": "Q?", "answer": "yes"}]} for _ in range(3)])
    assert "defined over 10" in scored(few, "vqa")["not_computed"]["vqa_accuracy"]
    with pytest.raises(DataError, match="holds no questions"):
        scored(described(tmp_path / "none", [{}] * 2), "vqa")
    doubled = [{"questions": [{"question": "Q?", "answer": "a", "question_id": 1}]}] * 2
    with pytest.raises(DataError, match="holds the question 1 more than once"):
        scored(described(tmp_path / "doubled", doubled), "vqa")


def test_generation_settings_reach_the_model(tmp_path: Path) -> None:
    folder = described(tmp_path / "qa", [{"questions": [{"question": "Q?", "answer": "a"}]}] * 2)
    module = oracle(folder).eval()
    model = Loaded(ModelVersion("", "", "", "stand-in"), module, TRANSFORM)  # type: ignore[arg-type]
    evaluate(config(folder, tasks=("vqa",), vqa={"length_penalty": -2.0, "max_new_tokens": 3}), loaded=model)
    assert module.how == {"num_beams": 5, "max_new_tokens": 3, "min_new_tokens": 1, "length_penalty": -2.0}
    evaluate(config(folder, tasks=("captioning",), num_beams=2, length_penalty=0.5), loaded=model)
    assert module.how == {"num_beams": 2, "max_new_tokens": 20, "min_new_tokens": 1, "length_penalty": 0.5}


def test_labels_in_the_samples_are_the_classes(tmp_path: Path) -> None:
    numbered = described(tmp_path / "n", [{"label": n} for n in range(7)])
    with pytest.raises(DataError, match="are numbers, which say nothing"):
        scored(numbered, "classification")
    (tmp_path / "names.txt").write_text("\n".join(f"number {n}" for n in range(8)))
    told = {"templates": ["picture {}"], "class_names": str(tmp_path / "names.txt")}
    numbers = scored(numbered, "classification", classification=told)
    assert (numbers["images"], numbers["classes"]) == (7, 8), "0 is a class, and all that are named are classes"
    assert numbers["top_1"] > 0.8
    assert numbers["classes_from"] == "classification.class_names"
    (tmp_path / "same.txt").write_text("\n".join(["crane"] * 2 + [f"number {n}" for n in range(5)]))
    with pytest.raises(DataError, match="calls two classes 'crane'"):
        scored(numbered, "classification", classification={"class_names": str(tmp_path / "same.txt")})
    (tmp_path / "few.txt").write_text("number 0\nnumber 1")
    with pytest.raises(DataError, match="no name for the label '2'"):
        scored(numbered, "classification", classification={"class_names": str(tmp_path / "few.txt")})
    folder = described(tmp_path / "labels", [{"label": f"number {n}"} for n in range(7)])
    result = scored(folder, "classification", classification={"templates": ["picture {}"]})
    assert (result["top_1"], result["top_5"], result["mean_per_class_recall"]) == (1.0, 1.0, 1.0)
    assert (result["classes"], result["top_1_chance"]) == (7, pytest.approx(1 / 7))
    wrong = scored(folder, "classification", classification={"templates": ["nothing known {}"]})
    assert wrong["top_1"] == 0.0  # every class looks alike, and ties are lost
    with pytest.raises(DataError, match=r"1 images have no class \(first s1\)"):
        scored(described(tmp_path / "some", [{"label": "a"}, {}]), "classification")


def test_matching_on_mined_and_on_given_negatives(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    result = evaluate(config(data, tasks=("matching",)), loaded=loaded)
    assert (result["itm_auc"], result["itm_accuracy"], result["negatives"]) == (1.0, 1.0, COUNT)
    assert "ITC ranks highest" in result["negatives_from"]
    given = described(tmp_path / "given", [{"negatives": [f"picture number {n}", "another"]} for n in (0, 2, 1)])
    found = scored(given, "matching")
    assert (found["negatives"], found["negatives_from"]) == (6, "the data set")
    # The first image's own caption is among its negatives: a tie for that pair, five other pairs of six per image.
    assert found["itm_auc"] == pytest.approx((3 * 5 + 3 * 0.5) / 18)
    assert found["itm_accuracy_negative"] == pytest.approx(5 / 6) and found["itm_first"] == pytest.approx(2 / 3)
    assert scored(given, "matching", matching={"negatives": "mined"})["itm_auc"] == 1.0
    partly = described(tmp_path / "partly", [{"negatives": ["x"]}, {}])
    with pytest.raises(DataError, match=r"1 images have no 'negatives' \(first s1\)"):
        scored(partly, "matching")


def test_equal_captions_are_no_negatives(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, text in enumerate(["same thing", "Same thing.", "other"]):
        members |= {f"s{number}.png": image_bytes(number), f"s{number}.txt": text.encode()}
    write_tar(tmp_path / "d" / "a.tar", members)
    index(str(tmp_path / "d"))
    out = tmp_path / "out"
    assert scored(tmp_path / "d", "matching", out=str(out))["itm_auc"] == 1.0
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    assert [row["match_negatives"] for row in rows[:2]] == [["other"], ["other"]]


def test_every_task_has_a_row_that_says_what_it_was_measured_under(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = evaluate(config(data, tasks=("retrieval", "captioning", "matching"), out=str(out)), loaded=loaded)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["retrieval", "captioning", "matching"]
    for row in rows:
        assert row["split"] == "heldout" and row["images"] == COUNT and row["comparable_to_paper"] is False
        assert "weights" in row["not_comparable_because"] and "no published split" in row["not_comparable_because"]
        assert "isthmus " in row["versions"] and "torch " in row["versions"] and row["data_digest"]
        assert row["metrics"] and {name: result[name] for name in row["metrics"]} == row["metrics"]
    assert rows[0]["ties"].startswith("pessimistic") and rows[0]["captions"] == COUNT and "prompt" not in rows[0]
    assert (rows[1]["prompt"], rows[1]["num_beams"], rows[1]["length_penalty"]) == ("", 1, 1.0)
    assert "PTBTokenizer" in rows[1]["tokenizer"] and "meteor" in rows[1]["not_computed"]
    assert "settings: num_beams 1 (LAVIS: 5)" in rows[1]["not_comparable_because"]
    assert result["matching_ties"] != result["ties"]  # a fact that two tasks have differently is told by task


def test_a_demand_for_meteor_is_refused_before_a_model_is_loaded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")

    def never() -> Loaded:
        raise AssertionError("the model was loaded")

    with pytest.raises(ConfigError, match="METEOR needs Java"):
        evaluate(config(data, tasks=("captioning",), meteor=True), load=never)
    with pytest.raises(ConfigError, match=r"spice-1\.0\.jar"):
        evaluate(config(data, tasks=("captioning",), spice_jars=str(data)), load=never)


def test_a_text_length_that_the_method_does_not_take_is_refused(data: Path, loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match="fixes the length of its texts"):
        evaluate(config(data, text_max_length=35), loaded=loaded)


# --------------------------------------------------------------------------------------------- published layouts


def on_disk(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    return folder


def coco(folder: Path, count: int) -> dict[str, Any]:
    """A COCO captions file over the images of :func:`on_disk`, as a layout."""
    table = {
        "images": [{"id": 10 + n, "file_name": f"{n}.png"} for n in range(count)],
        "annotations": [{"id": n, "image_id": 10 + n, "caption": f"picture number {n}"} for n in range(count)],
    }
    file = folder.parent / "captions.json"
    file.write_text(json.dumps(table))
    return {"kind": "coco", "images": str(folder), "annotations": str(file), "split": "val"}


def test_a_published_layout_is_scored_like_shards(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    layout = coco(on_disk(tmp_path / "images", COUNT), COUNT)
    options: dict[str, Any] = {"model": "stand-in", "batch": 4, "meteor": False, "tasks": ("retrieval", "captioning")}
    found = evaluate(EvaluateConfig(layout=layout, **options), loaded=loaded)
    shards = evaluate(EvaluateConfig(data=str(data), **options), loaded=loaded)
    assert {n: v for n, v in found.items() if n.startswith(("tr_", "ir_"))} == {
        n: v for n, v in shards.items() if n.startswith(("tr_", "ir_"))
    }
    assert (found["data_layout"], found["split"], found["images"], found["references"]) == ("coco", "val", COUNT, COUNT)
    (tmp_path / "images" / "3.png").unlink()
    less = evaluate(EvaluateConfig(layout=layout, **options), loaded=loaded)
    assert (less["unreadable"], less["images"], less["samples"]) == (1, COUNT - 1, COUNT)
    assert "3.png" in less["unreadable_first"] and "1 images could not be read" in str(less["not_comparable_because"])


def test_a_data_set_without_a_readable_image_is_refused_with_the_reason(loaded: Loaded, tmp_path: Path) -> None:
    layout = coco(on_disk(tmp_path / "images", 2), 2)
    layout["images"] = str(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"None of the samples .*0\.png: There is nothing at"):
        evaluate(EvaluateConfig(model="m", layout=layout, meteor=False), loaded=loaded)


def test_questions_without_published_answers_are_answered_for_the_server(loaded: Loaded, tmp_path: Path) -> None:
    images, file = on_disk(tmp_path / "images", 3), tmp_path / "questions.json"
    asked = [{"question_id": 5 - n, "image_id": n, "question": "Which?"} for n in range(3)]
    file.write_text(json.dumps({"questions": asked}))
    layout = {
        "kind": "vqav2",
        "images": str(images),
        "questions": str(file),
        "image_name": "{}.png",
        "split": "test-dev",
    }
    out = tmp_path / "out"
    result = evaluate(EvaluateConfig(model="m", layout=layout, tasks=("vqa",), out=str(out)), loaded=loaded)
    assert "vqa_accuracy" not in result and "not published" in result["not_computed"]["vqa_accuracy"]
    assert json.loads((out / "answers.json").read_text())[0] == {
        "question_id": 5,
        "answer": "Question: which? Short answer: picture number 0",
    }


def test_missing_and_doubled_rows_of_a_worker_are_refused(data: Path, loaded: Loaded) -> None:
    from isthmus.data.readers import Failure
    from isthmus.evaluation.pool import accounted
    from isthmus.evaluation.work import Part

    broken = Failure(3, "k", "s", 0, "why")
    accounted([1, 2, 3], [Part(ids=[1]), Part(ids=[2], failures=[broken])])
    with pytest.raises(DataError, match=r"gave 2 rows .* where 3 were asked: 1 missing, 0 doubled .*first id 2"):
        accounted([1, 2, 3], [Part(ids=[1], failures=[broken])])
    with pytest.raises(DataError, match="0 missing, 1 doubled or foreign"):
        accounted([1, 2], [Part(ids=[1, 2, 1])])

    class Silent(Oracle):
        def generate(self, features_BND: Tensor, prompt: Any = None, **how: Any) -> list[str]:
            return super().generate(features_BND, prompt, **how)[1:]

    silent = Loaded(loaded.version, Silent(loaded.module.known).eval(), TRANSFORM)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gave 3 texts for 4 prompts"):
        evaluate(config(data, tasks=("captioning",)), loaded=silent)


def test_the_tracking_server_keeps_each_evaluation(data: Path, loaded: Loaded, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = start_run(uri, "isthmus", "trained")
    tracked = replace(loaded, version=replace(loaded.version, lineage={"run_id": run_id}))
    found = [
        evaluate(config(data, limit=limit, tracking={"uri": uri}), loaded=tracked)["tr_mean_rank"] for limit in (5, 6)
    ]
    api = client(uri)
    below = api.search_runs([api.get_run(run_id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    kept = {run.data.params["limit"]: run.data.metrics["tr_mean_rank"] for run in below}
    assert kept == {"5": found[0], "6": found[1]}
    assert all(run.info.status == "FINISHED" and run.data.params["data"] == str(data) for run in below)
    assert api.get_run(run_id).data.metrics["eval/tr_mean_rank"] == found[1], "the newest"
