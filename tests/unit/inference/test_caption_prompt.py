"""Which prompt stands before a caption, what the job's books say of it, and whose folder that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from isthmus.config import CaptionConfig, TrackingConfig
from isthmus.data.manifest import Manifest, index
from isthmus.data.stream import iter_samples
from isthmus.errors import ConfigError, DataError
from isthmus.inference import caption as captioning
from isthmus.inference.bulk import BulkReport
from isthmus.inference.commits import Job, Ledger, chunks, digest_of
from isthmus.inference.engine import Engine, Generation
from isthmus.inference.loading import LoadModel, ModelHandle, resolve_model
from isthmus.methods.artefact import load_artefact, save_artefact
from isthmus.models.freezing import owned_state
from isthmus.testing.shards import make_dataset
from method_cases import ANSWERS, build, moved, recipe, run_config

COUNT, OWN = 4, "a photo of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    make_dataset(folder / "data", COUNT)
    index(str(folder / "data"))
    return str(folder / "data")


@pytest.fixture(scope="module")
def handle(folder: Path) -> ModelHandle:
    """A stage 2 whose recipe has a prompt, its weights moved far from the start."""
    config: Any = recipe("blip2_stage2", folder)
    config = config.model_copy(update={"language": config.language.model_copy(update={"prompt": OWN})})
    stage = build(config, with_vision=True)
    moved(stage.module)
    save_artefact(folder / "model", owned_state(stage.module), run_config(config), stage, {})
    return resolve_model(str(folder / "model"), TrackingConfig())


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's chunks done here, one after the other, instead of by actors."""

    def run(label: str, job: Job, manifest: Manifest, out: str, chunk: int, open_work: Any, give: Any) -> BulkReport:
        plan, ledger = chunks(len(manifest), chunk), Ledger(out, job)
        ledger.open()
        done = ledger.committed(plan)
        work = open_work()
        for part in [c for c in plan if c.index not in done]:
            made = work.process(range(part.start, part.stop))
            ledger.commit(part, made.table, made.quarantined)
        rows, aside = ledger.reconcile(plan, manifest.ids)
        ledger.close(aside, {})
        return BulkReport(len(manifest), rows, len(aside), len(done), 1.0, 1.0, out)

    monkeypatch.setattr(captioning, "run_bulk", run)


def caption(handle: ModelHandle, data: str, out: Path, **options: Any) -> captioning.CaptionReport:
    config = CaptionConfig(model=handle.path, data=data, out=str(out), chunk=2, max_new_tokens=6, **options)
    return captioning.caption_with(config, handle, LoadModel(handle, TrackingConfig()))


def facts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "job.json").read_text())["facts"]
    return found


def texts(out: Path) -> list[str]:
    return [row["caption"] for part in sorted((out / "parts").iterdir()) for row in pq.read_table(part).to_pylist()]


def expected(handle: ModelHandle, data: str, prompt: str) -> list[str]:
    """By the language model itself, its prompt said outright."""
    stage = load_artefact(handle.path).stage
    (group,) = iter_samples(Manifest.load(data), transform=stage.transform)
    module: Any = stage.module
    with torch.no_grad():
        soft = module.soft_prompt(module.encode_images(torch.stack([torch.from_numpy(s.pixels_CHW) for s in group])))
        made: list[str] = module.language.generate(soft, prompt, max_new_tokens=6, min_new_tokens=1)
    return made


def test_the_prompt_that_was_used_is_recorded(handle: ModelHandle, data: str, tmp_path: Path) -> None:
    assert handle.own_prompt == OWN
    asked: dict[str, dict[str, Any]] = {"own": {}, "none": {"prompt": ""}, "other": {"prompt": "the red cat"}}
    used = {"own": OWN, "none": "", "other": "the red cat"}
    for name, options in asked.items():
        caption(handle, data, tmp_path / name, **options)
        assert facts(tmp_path / name)["prompt"] == used[name]
        assert texts(tmp_path / name) == expected(handle, data, used[name])
    assert len({tuple(texts(tmp_path / name)) for name in asked}) == 3, "a model that ignores its prompt shows nothing"
    with pytest.raises(DataError, match=f"prompt: there '{OWN}', now ''"):
        caption(handle, data, tmp_path / "own", prompt="")
    again = caption(handle, data, tmp_path / "own", prompt=OWN)  # the same captions, so the same job
    assert again.skipped_chunks == 2


def test_a_folder_of_an_earlier_release_is_not_mixed_with_another_prompt(
    handle: ModelHandle, data: str, tmp_path: Path
) -> None:
    """It recorded '' and used the recipe's own."""
    caption(handle, data, tmp_path / "out", prompt="")
    record = json.loads((tmp_path / "out" / "job.json").read_text())
    assert record["facts"].pop("own_prompt") == "left out"
    record["digest"] = digest_of({"kind": record["kind"], "facts": record["facts"]})
    (tmp_path / "out" / "job.json").write_text(json.dumps(record))
    for options in ({}, {"prompt": ""}):
        with pytest.raises(DataError, match="another job"):
            caption(handle, data, tmp_path / "out", **options)


def test_without_a_prompt_in_the_recipe_a_job_keeps_its_digest(data: str) -> None:
    manifest, handle = Manifest.load(data), ModelHandle("m", "", "digest")
    config = CaptionConfig(model="m", data=data, out="out")
    before = {
        "model": "digest", "manifest": manifest.digest, "chunk": 128, "features": "images",
        "prompt": "", "max_new_tokens": 20, "min_new_tokens": 1, "num_beams": 1, "length_penalty": 1.0,
    }  # fmt: skip
    found = captioning.caption_job(handle, manifest, config, Generation(""))
    assert found.digest == Job("caption", before).digest


def test_a_model_that_answers_is_asked_the_prompt(folder: Path) -> None:
    stage = build(recipe("guided_vqa", folder))
    engine = Engine(stage.module.eval(), stage.transform, "models:/vqa/1")
    features_BND = torch.randn(3, stage.image_spec["tokens"], stage.image_spec["width"])
    answers = engine.caption(features_BND, Generation(prompt="what is it"))
    assert len(answers) == 3 and set(answers) <= set(ANSWERS)
    with pytest.raises(ConfigError, match="answers questions and writes no captions"):
        engine.caption(features_BND, Generation())
