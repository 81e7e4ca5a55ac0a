"""Every task with real modules of small size, loaded from the folders that training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.config import EvaluateConfig
from isthmus.data.manifest import index
from isthmus.errors import ConfigError
from isthmus.evaluation.driver import evaluate
from isthmus.methods.artefact import load_artefact, save_artefact
from isthmus.methods.co_optimise_config import MatchConfig
from isthmus.models.freezing import owned_state
from isthmus.testing.shards import image_bytes, write_tar
from method_cases import CAPTIONS, build, moved, recipe, run_config

COUNT = 8
QUESTIONS = ("Is it a cat?", "What color is the house to the left of the dogs?", "How many?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    members: dict[str, bytes] = {}
    for n in range(COUNT):
        asked = [{"question": text, "answers": ["red"] * 6 + ["blue"] * 4} for text in QUESTIONS[: 1 + n % 3]]
        members[f"s{n}.png"] = image_bytes(n)
        members[f"s{n}.txt"] = CAPTIONS[n].encode()
        members[f"s{n}.json"] = json.dumps({"questions": asked, "label": CAPTIONS[n % 4]}).encode()
    write_tar(folder / "data" / "a.tar", members)
    index(str(folder / "data"))
    return folder / "data"


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, str]:
    """Artefacts of every method, their weights moved far from the start."""
    out = {}
    for method in ("blip2_stage1", "blip2_stage2", "guided", "guided_vqa", "projector"):
        config = recipe(method, folder)
        stage = build(config, with_vision=True)
        moved(stage.module)
        save_artefact(folder / method, owned_state(stage.module), run_config(config), stage, {})
        out[method] = str(folder / method)
    return out


def run(model: str, data: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig(model=model, data=str(data), tasks=tasks, batch=3, meteor=False, **options))


@pytest.mark.parametrize("method", ["blip2_stage1", "projector"])
def test_what_embeds_retrieves_and_classifies(models: dict[str, str], data: Path, method: str) -> None:
    result = run(models[method], data, "retrieval", "classification", classification={"templates": ["{}", "a {}"]})
    assert 1 < result["tr_mean_rank"] < COUNT and result["classes"] == 4 and 0 <= result["top_1"] <= 1
    assert "vision random" in result["model_bases"] and "Tokenizer" in result["model_tokenizers"]


def test_stage_1_reranks_and_matches(models: dict[str, str], data: Path) -> None:
    plain = run(models["blip2_stage1"], data, "retrieval")
    full = run(models["blip2_stage1"], data, "retrieval", "matching", rerank=COUNT, text_max_length=35)
    assert full["tr_mean_rank"] != plain["tr_mean_rank"] and full["text_max_length"] == 35
    assert 0 <= full["itm_auc"] <= 1 and full["negatives"] == COUNT
    # Re-ranking all candidates is scoring every pair by cosine and logit.
    module = load_artefact(models["blip2_stage1"]).stage.module
    read = _features(module, models["blip2_stage1"], data)
    with torch.no_grad():
        sims = torch.einsum("nqe,ce->nqc", module.embed_images(read), module.embed_texts(CAPTIONS)).amax(1)
        rows = [module.match(read[i : i + 1].expand(COUNT, -1, -1), CAPTIONS) for i in range(COUNT)]
    scores = sims + torch.stack(rows)
    ranks = [1 + int((scores[i] > scores[i, i]).sum()) for i in range(COUNT)]
    assert full["tr_mean_rank"] == pytest.approx(sum(ranks) / COUNT)


def co_optimised(folder: Path, name: str, **changes: Any) -> str:
    config = recipe("co_optimise", folder, **changes)
    stage = build(config, with_vision=True)
    moved(stage.module)
    save_artefact(folder / name, owned_state(stage.module), run_config(config), stage, {})
    return str(folder / name)


def test_every_pair_is_ranked_by_matching_alone_where_there_is_no_contrast(folder: Path, data: Path) -> None:
    model = co_optimised(folder, "matching alone", alpha=0.0, beta=0.0)
    result = run(model, data, "retrieval", rerank="all")
    assert (result["rerank"], result["ranked_by"]) == ("all", "matching alone")
    module = load_artefact(model).stage.module
    read = _features(module, model, data)
    scores = torch.stack([module.match(read[i : i + 1].expand(COUNT, -1, -1), CAPTIONS) for i in range(COUNT)])
    for way, table in (("tr", scores), ("ir", scores.T)):
        ranks = [1 + int((table[i] > table[i, i]).sum()) for i in range(COUNT)]
        assert result[f"{way}_mean_rank"] == pytest.approx(sum(ranks) / COUNT) and result[f"{way}_mean_rank"] > 1
    for options, tasks in (({}, ("retrieval",)), ({"rerank": 3}, ("retrieval",)), ({}, ("classification",))):
        with pytest.raises(ConfigError, match="without a contrast"):
            run(model, data, *tasks, **options)


def test_negatives_are_not_mined_without_a_contrast(folder: Path, data: Path) -> None:
    model = co_optimised(folder, "matching alone, judged", alpha=0.0, beta=0.0)
    for negatives in ("auto", "mined"):
        with pytest.raises(ConfigError, match="without a contrast"):
            run(model, data, "matching", matching={"negatives": negatives})


def test_all_is_the_number_of_candidates(folder: Path, data: Path) -> None:
    model = co_optimised(folder, "co-optimised", gamma=3.0)
    every, counted, plain = (run(model, data, "retrieval", rerank=k) for k in ("all", COUNT, 0))
    figures = [name for name in every if name.startswith(("tr_", "ir_"))]
    assert {name: every[name] for name in figures} == {name: counted[name] for name in figures}
    assert every["ranked_by"] != plain["ranked_by"] and every["tr_mean_rank"] != plain["tr_mean_rank"]


def test_contrast_alone_is_not_reranked(folder: Path, data: Path) -> None:
    model = co_optimised(folder, "contrast alone", beta=0.0, itm=MatchConfig())
    assert run(model, data, "retrieval")["ranked_by"] == "cosine"
    with pytest.raises(ConfigError, match="nothing to re-rank with"):
        run(model, data, "retrieval", rerank=2)


def test_stage_2_answers_each_question_with_its_own_prompt(models: dict[str, str], data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    result = run(models["blip2_stage2"], data, "vqa", "captioning", out=str(tmp_path), vqa={"num_beams": 3})
    assert result["questions"] == sum(1 + n % 3 for n in range(COUNT)) and 0 <= result["vqa_accuracy"] <= 1
    module = load_artefact(models["blip2_stage2"]).stage.module
    read = _features(module, models["blip2_stage2"], data)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    said = set()
    for n, row in enumerate(rows):
        for question, answer in zip(row["questions"], row["answers"], strict=True):
            cleaned = question.lower()
            alone = module.generate(
                read[n : n + 1], prompt=f"Question: {cleaned} Short answer:", num_beams=3, max_new_tokens=10,
                min_new_tokens=1, length_penalty=-1.0,
            )  # fmt: skip
            assert alone == [answer]
            said.add(answer)
    assert len(said) > 1


@pytest.mark.parametrize(("asked", "used"), [({}, "a photo of"), ({"prompt": ""}, ""), ({"prompt": "the"}, "the")])
def test_captioning_names_the_prompt_that_was_used(
    models: dict[str, str], data: Path, tmp_path: Path, asked: dict[str, str], used: str
) -> None:
    import pyarrow.parquet as pq

    artefact = load_artefact(models["blip2_stage2"])
    method: Any = artefact.recipe.method
    language = method.language.model_copy(update={"prompt": "a photo of"})
    changed = artefact.recipe.model_copy(update={"method": method.model_copy(update={"language": language})})
    module: Any = artefact.stage.module
    save_artefact(tmp_path / "model", owned_state(module), changed, artefact.stage, {})
    result = run(str(tmp_path / "model"), data, "captioning", out=str(tmp_path / "out"), max_new_tokens=6, **asked)
    told = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert result["prompt"] == told["prompt"] == used
    soft = module.soft_prompt(_features(module, models["blip2_stage2"], data))
    alone = {
        text: module.language.generate(soft, text, max_new_tokens=6, min_new_tokens=1)
        for text in (used, "a photo of", "")
    }
    rows = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    captions = [row["caption"] for row in sorted(rows, key=lambda row: str(row["key"]))]
    assert captions == alone[used] and alone["a photo of"] != alone[""]


def test_guided_reranks_by_looking_at_each_image_under_each_text(models: dict[str, str], data: Path) -> None:
    plain, full = (run(models["guided"], data, "retrieval", rerank=k) for k in (0, COUNT))
    assert full["tr_mean_rank"] != plain["tr_mean_rank"]
    judged = run(models["guided"], data, "matching")
    assert 0 <= judged["itm_auc"] <= 1 and judged["negatives"] == COUNT
    # Re-ranking all candidates is scoring every pair by the unguided cosine and the guided score.
    module = load_artefact(models["guided"]).stage.module
    read = _features(module, models["guided"], data)
    texts = list(CAPTIONS[:COUNT])
    with torch.no_grad():
        sims = module.embed_images(read)[:, 0] @ module.embed_texts(texts).T
        pairs = module.match(read.repeat_interleave(COUNT, 0), texts * COUNT).view(COUNT, COUNT)
    ranks = ((sims + pairs) >= (sims + pairs).diagonal().unsqueeze(1)).sum(1).float()
    assert full["tr_mean_rank"] == pytest.approx(float(ranks.mean()))


def test_answers_of_a_closed_set_are_scored_by_the_same_task(models: dict[str, str], data: Path) -> None:
    result = run(models["guided_vqa"], data, "vqa")
    assert result["questions"] == sum(1 + n % 3 for n in range(COUNT)) and 0 <= result["vqa_accuracy"] <= 1
    assert result["vqa_accuracy_prior"] == 1.0 and 1 <= result["answers_distinct"] <= 5
    with pytest.raises(ConfigError, match="implements no Embeds"):
        run(models["guided_vqa"], data, "retrieval")


def test_what_a_method_cannot_do_is_said(models: dict[str, str], data: Path) -> None:
    with pytest.raises(ConfigError, match="implements no Judges"):
        run(models["projector"], data, "matching")
    with pytest.raises(ConfigError, match="implements no Embeds"):
        run(models["blip2_stage2"], data, "classification")
    with pytest.raises(ConfigError, match="implements no Captions"):
        run(models["projector"], data, "vqa")
    with pytest.raises(ConfigError, match="takes no prompt"):
        run(models["blip2_stage1"], data, "vqa")


def _features(module: Any, model: str, data: Path) -> torch.Tensor:
    from isthmus.data.manifest import Manifest
    from isthmus.data.readers import RawSample, read_rows
    from isthmus.data.transforms import decode_image

    transform = load_artefact(model).stage.transform
    manifest, pixels = Manifest.load(str(data)), []
    for sample in read_rows(manifest, range(len(manifest))):
        assert isinstance(sample, RawSample)
        pixels.append(torch.from_numpy(transform(decode_image(sample.image))))
    with torch.no_grad():
        return module.encode_images(torch.stack(pixels)).float()
