"""What is found wrong with a run before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_method as tiny
from isthmus.config import TextConfig, VisionConfig, load_run
from isthmus.contracts import Base
from isthmus.data.manifest import Manifest, index
from isthmus.errors import ConfigError, DataError, IsthmusError, RegistryError, WeightsError
from isthmus.methods import METHODS, MethodSpec
from isthmus.methods.projector import ProjectorConfig
from isthmus.testing.shards import make_dataset
from isthmus.training import preflight


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, "tiny", tiny.SPEC)
    index(str(make_dataset(tmp_path / "data", 12)))
    return str(tmp_path)


def begun(root: str) -> None:
    """A run that has come to its first checkpoint."""
    preflight.write_recipe(preflight.check(tiny.recipe(root, "a")))
    (Path(root) / "runs" / "a" / "checkpoints").mkdir()


def test_a_sound_run_gets_a_plan_and_writes_its_recipe(root: str) -> None:
    plan = preflight.check(tiny.recipe(root, "a"))
    assert plan.samples == 12
    assert plan.lineage["data"]["samples"] == 12 and len(plan.lineage["data"]["digest"]) == 64
    assert plan.lineage["code"]["package"]
    preflight.write_recipe(plan)
    stored = load_run(f"{root}/runs/a/recipe.yaml", methods={"tiny": tiny.TinyConfig})
    assert stored.model_dump() == plan.run.model_dump()


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"train": {"lr": 0.5}}, "train.lr: was 0.01, is 0.5"),
        ({"train": {"steps": 8}}, "train.steps: was 9, is 8"),
        ({"method": {"width": 7}}, "method.width: was 6, is 7"),
        ({"train": {"clip_norm": 2.0}}, r"train\.clip_norm: was 1\.0, is 2\.0"),
    ],
)
def test_a_run_name_belongs_to_one_recipe(root: str, sections: dict[str, Any], field: str) -> None:
    begun(root)
    with pytest.raises(ConfigError, match=field) as caught:
        preflight.check(tiny.recipe(root, "a", **sections))
    assert "another name" in caught.value.mend


def test_a_rate_that_would_rise_is_refused_and_a_long_warm_up_told(root: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"train\.min_lr 1e-05 is above train\.lr 5e-06"):
        preflight.check(tiny.recipe(root, "a", train={"lr": 5e-6, "min_lr": 1e-5}))
    preflight.check(tiny.recipe(root, "b", train={"warmup_steps": 9}))
    assert "never reaches train.lr" in caplog.text


def test_a_cache_made_anew_by_other_weights_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "seeing", MethodSpec(SeeingConfig, tiny.build))
    run = tiny.recipe(root, "a", data={"placement": "cached", "cache": f"{root}/cache"})
    run = run.model_copy(update={"method": SeeingConfig(name="seeing")})
    meta = Meta(Manifest.load(f"{root}/data").digest)
    monkeypatch.setattr("isthmus.data.features.read_meta", lambda url: meta)
    preflight.write_recipe(preflight.check(run))
    (Path(root) / "runs" / "a" / "checkpoints").mkdir()
    preflight.check(run)
    meta.encoder_digest = "f" * 64
    with pytest.raises(ConfigError, match="weights of the encoder that made the features: were eeee"):
        preflight.check(run)


def test_a_parent_folder_with_other_content_is_another_parent(root: str) -> None:
    begun(root)
    file = Path(root) / "runs" / "a" / "lineage.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "parent": {"name": "artefact", "version": "", "digest": "a" * 64}}))
    with pytest.raises(ConfigError, match="parent digest: was aaaa"):
        preflight.check(tiny.recipe(root, "a"))


def test_a_run_that_has_not_come_to_a_checkpoint_may_be_mended_and_starts_anew(root: str) -> None:
    preflight.write_recipe(preflight.check(tiny.recipe(root, "a")))
    rows = Path(root) / "runs" / "a" / "metrics.jsonl"
    rows.write_text("{}\n")
    preflight.check(tiny.recipe(root, "a"))
    assert rows.exists(), "the same recipe goes on with its own rows"
    preflight.check(tiny.recipe(root, "a", method={"width": 7}))
    assert not rows.exists()


def test_an_image_encoder_that_does_not_exist_is_found_before_anything_starts(root: str) -> None:
    method = ProjectorConfig(vision=VisionConfig(name="vit_tinny_patch16_224", weights="random"))
    with pytest.raises(ConfigError, match="Did you mean 'vit_tiny_patch16_224'"):
        preflight.check(tiny.recipe(root, "a").model_copy(update={"method": method}))


def test_weights_that_are_not_there_are_found_before_anything_starts(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ProjectorConfig(vision=VisionConfig(name="vit_tiny_patch16_224", weights=f"{root}/none.safetensors"))
    run = tiny.recipe(root, "a").model_copy(update={"method": method})
    with pytest.raises(WeightsError, match=r"no file or folder '.*none\.safetensors'"):
        preflight.check(run)
    with pytest.raises(ConfigError, match="Did you mean 'efficientnet-lite0'"):
        preflight.check(
            run.model_copy(update={"method": ProjectorConfig(text=TextConfig(weights="pkg:eficientnet-lite0"))})
        )
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    preflight.check(run)  # there the path is the workers' own affair


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 30}},
        {"train": {"log_every": 1, "checkpoint_every": 9, "keep_checkpoints": 1}},
        {"cluster": {"max_failures": 0, "workers": 1}},
        {"model": {"name": "m", "alias": "other"}},
        {"data": {"prefetch": 9}},
    ],
)
def test_more_steps_and_what_does_not_touch_the_result_may_change(root: str, sections: dict[str, Any]) -> None:
    first = preflight.check(tiny.recipe(root, "a"))
    preflight.write_recipe(first)
    again = preflight.check(tiny.recipe(root, "a", **sections))
    assert (again.digest == first.digest) == ("steps" not in sections.get("train", {}))


def test_other_data_under_the_same_url_is_refused(root: str) -> None:
    begun(root)
    make_dataset(Path(root) / "data", 12, start=100)
    index(f"{root}/data")
    with pytest.raises(ConfigError, match="data digest: was"):
        preflight.check(tiny.recipe(root, "a"))


def mixed(root: str, first: str = "data", second: str = "more", weight: float = 1, **data: Any) -> dict[str, Any]:
    sets = [{"url": f"{root}/{first}", "weight": 3}, {"url": f"{root}/{second}", "weight": weight}]
    return {"data": {"train": None, "mixture": sets, **data}}


def test_the_record_of_a_mixture_holds_every_set_and_another_one_is_refused(root: str) -> None:
    more = index(str(make_dataset(Path(root) / "more", 5, start=50)))
    plan = preflight.check(tiny.recipe(root, "a", **mixed(root)))
    assert (plan.samples, plan.sizes) == (17, (12, 5))
    record = plan.lineage["data"]
    assert record["samples"] == 17 and len(record["digest"]) == 64
    assert record["sets"][1] == {"url": f"{root}/more", "digest": more.digest, "samples": 5, "weight": 1}
    preflight.write_recipe(plan)
    (Path(root) / "runs" / "a" / "checkpoints").mkdir()

    def again(**change: Any) -> str:
        return preflight.check(tiny.recipe(root, "a", **mixed(root, **change))).digest

    Path(root, "more").rename(f"{root}/elsewhere")
    sixfold = mixed(root, second="elsewhere", weight=2)
    sixfold["data"]["mixture"][0]["weight"] = 6
    same = preflight.check(tiny.recipe(root, "a", **sixfold))
    assert same.digest == plan.digest == again(second="elsewhere"), "the same sets and shares in another place"
    words = rf"data digest: was \w+ \(3 x {root}/data, 1 x {root}/more\), is \w+ \(3 x .*, 2 x {root}/elsewhere\)"
    with pytest.raises(ConfigError, match=words):
        again(second="elsewhere", weight=2)
    with pytest.raises(ConfigError, match=r"data digest: was .*1 x .*/more\), is \w+\."):
        preflight.check(tiny.recipe(root, "a"))


def test_a_mixture_of_what_is_not_there_or_there_twice_is_refused(root: str) -> None:
    make_dataset(Path(root) / "bare", 3)
    with pytest.raises(DataError, match=r"/bare is not indexed .*isthmus data index"):
        preflight.check(tiny.recipe(root, "a", **mixed(root, second="bare")))
    shutil.copytree(f"{root}/data", f"{root}/copy")
    with pytest.raises(DataError, match=r"/data and .*/copy hold the same data .*the sum of its weights"):
        preflight.check(tiny.recipe(root, "a", **mixed(root, second="copy")))


@pytest.mark.parametrize(
    ("sections", "kind", "words"),
    [
        ({"data": {"train": "{root}/nowhere"}}, IsthmusError, "nowhere"),
        ({"data": {"placement": "cached", "cache": "{root}/no-cache"}}, IsthmusError, "no-cache"),
        ({"tracking": {"uri": "http://127.0.0.1:9"}}, RegistryError, "No tracking server answers"),
        ({"parent": "models:/absent@candidate"}, RegistryError, "absent"),
        ({"storage": "/proc/nothing/here"}, IsthmusError, "/proc/nothing"),
    ],
)
def test_faults_are_named_before_anything_starts(
    root: str, sections: dict[str, Any], kind: type[IsthmusError], words: str
) -> None:
    filled = {
        key: {k: v.format(root=root) if isinstance(v, str) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in sections.items()
    }
    with pytest.raises(kind, match=words):
        preflight.check(tiny.recipe(root, "a", **filled))


def test_an_empty_data_set_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        digest = "0"

        def __len__(self) -> int:
            return 0

    monkeypatch.setattr("isthmus.data.manifest.Manifest.load", lambda url: Empty())
    with pytest.raises(DataError, match="holds no samples"):
        preflight.check(tiny.recipe(root, "a"))


def test_a_finished_run_is_known_by_its_digest(root: str) -> None:
    plan = preflight.check(tiny.recipe(root, "a"))
    assert preflight.finished(plan) is None
    file = Path(root) / "runs" / "a" / "finished.json"
    file.write_text('{"digest": "other"}')
    assert preflight.finished(plan) is None
    file.write_text(f'{{"digest": "{plan.digest}", "version": "3"}}')
    assert (preflight.finished(plan) or {})["version"] == "3"


class Meta:
    """The header of a feature cache."""

    def __init__(self, data_digest: str, **vision: Any) -> None:
        self.manifest_digest, self.encoder_digest = data_digest, "e" * 64
        self.vision = VisionConfig(**vision).model_dump(mode="json")


@pytest.mark.parametrize(
    ("vision", "other_data", "words"),
    [
        ({}, False, None),
        ({"image_size": 96}, False, "another encoder than method.vision .image_size: cache 96, recipe None"),
        ({}, True, "was made of other data"),
    ],
)
def test_a_feature_cache_must_be_of_this_data_and_encoder(
    root: str, monkeypatch: pytest.MonkeyPatch, vision: dict[str, Any], other_data: bool, words: str | None
) -> None:
    digest = "0" * 64 if other_data else Manifest.load(f"{root}/data").digest
    monkeypatch.setattr("isthmus.data.features.read_meta", lambda url: Meta(digest, **vision))
    monkeypatch.setitem(METHODS, "seeing", MethodSpec(SeeingConfig, tiny.build))
    run = tiny.recipe(root, "a", data={"placement": "cached", "cache": f"{root}/cache"})
    run = run.model_copy(update={"method": SeeingConfig(name="seeing")})
    if words is None:
        assert preflight.check(run).cached == (Base("vision", VisionConfig().weights, "e" * 64),)
    else:
        with pytest.raises(DataError, match=words):
            preflight.check(run)


class SeeingConfig(tiny.TinyConfig):
    vision: VisionConfig = VisionConfig()
