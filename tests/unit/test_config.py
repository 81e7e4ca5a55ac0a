"""Recipes: every file that ships is valid, faults name key and mend, what is written out reads back equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from isthmus.config import (
    CaptionConfig,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    RunConfig,
    SelectConfig,
    VisionConfig,
    load_config,
    load_run,
    read_yaml,
    to_yaml,
)
from isthmus.config.load import apply_overrides
from isthmus.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "pipelines").rglob("*.y*ml"))


class Toy(MethodConfig):
    vision: VisionConfig = VisionConfig()
    strength: float = 1.0


METHODS = {"toy": Toy}
RUN: dict[str, Any] = {
    "name": "r1",
    "method": {"name": "toy"},
    "data": {"train": "data/train"},
    "train": {"steps": 5},
}


def run(*overrides: str, **changes: Any) -> RunConfig:
    return load_run(None, overrides, methods=METHODS, values={**RUN, **changes})


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    keys = set(read_yaml(path))
    if {"steps", "extends"} & set(keys):
        from isthmus.pipeline import load_pipeline

        assert load_pipeline(path).steps
    elif "method" in keys:
        from isthmus.methods import method_configs

        assert load_run(path, methods=method_configs()).train.steps > 0
    elif "models" in keys:
        from isthmus.config import ServeConfig

        assert load_config(ServeConfig, path).models
    elif "tasks" in keys:
        assert load_config(EvaluateConfig, path).tasks
    elif {"vision", "text"} <= keys:
        assert load_config(SelectConfig, path).text
    else:
        assert load_config(CaptionConfig, path).model


def test_recipes_of_pipeline_steps_exist_and_are_valid_with_their_options() -> None:
    from isthmus.methods import method_configs
    from isthmus.pipeline import load_pipeline

    for path in RECIPES:
        if not {"steps", "extends"} & set(read_yaml(path)):
            continue
        for step in load_pipeline(path).steps:
            if step.run == "train":
                assert step.recipe is not None
                plain = [f"{k}={v}" for k, v in step.options.items() if "${" not in str(v)]
                load_run(path.parent / step.recipe, plain, methods=method_configs())


def test_what_is_written_out_reads_back_equal(tmp_path: Path) -> None:
    config = run("method.strength=2.5", "train.lr=3e-4", "model.name=m")
    (tmp_path / "r.yaml").write_text(to_yaml(config))
    again = load_run(tmp_path / "r.yaml", methods=METHODS)
    assert again == config
    assert "weight_decay: 0.05" in to_yaml(config), "defaults are written out"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", "Did you mean 'steps'"),
        ("method.strenght=3", "Did you mean 'strength'"),
        ("method.vision.image_sise=3", "Did you mean 'image_size'"),
        ("clustr.workers=3", "Did you mean 'cluster'"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("zero.stage=4", "zero.stage"),
        ("name='a/b'", "'name'"),
        ("method.name=toi", "Did you mean 'toy'"),
        ("data.placement=cached", "isthmus data cache"),
        ("train.global_batch=5", "does not divide among"),
        ("cluster.workers=[4, 2]", "or two of them, [fewest, most]"),
        ("cluster.workers=many", "a whole number above 0"),
        ("cluster.workers=[0, 2]", "a whole number above 0"),
    ],
)
def test_a_fault_names_its_key_and_the_mend(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(override)
    assert says in str(refused.value)


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        run("train.stepz=3", "zero.stage=9", "cluster.workers=-1")
    assert len(str(refused.value).splitlines()) == 3


def test_workers_are_a_number_or_a_range() -> None:
    assert (run("cluster.workers=4").cluster.most_workers, run().cluster.elastic) == (4, False)
    cluster = run("cluster.workers=[1, 4]").cluster
    assert (cluster.workers, cluster.most_workers, cluster.elastic) == ((1, 4), 4, True)
    alone = run("cluster.workers=0").cluster
    assert (alone.in_process, alone.most_workers, alone.elastic) == (True, 1, False)
    assert not any(run(f"cluster.workers={n}").cluster.in_process for n in ("1", "[1, 2]"))


@pytest.mark.parametrize("word", ["train.steps", "=3", " = 3"])
def test_a_word_that_is_no_override(word: str) -> None:
    with pytest.raises(ConfigError, match=r"not of the form section\.key=value"):
        run(word)


def test_an_override_into_a_single_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="single value"):
        run("name.first=x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("models:/m@a", "models:/m@a"),
        ("null", None),
        ("", ""),
    ],
)
def test_values_of_overrides_are_read_as_people_mean_them(text: str, value: Any) -> None:
    assert apply_overrides({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_overrides_leave_the_recipe_itself_alone() -> None:
    recipe: Mapping[str, Any] = {"train": {"steps": 1}}
    assert apply_overrides(recipe, ["train.steps=2"])["train"]["steps"] == 2
    assert recipe["train"]["steps"] == 1


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "stage1.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"Did you mean 'stage1\.yaml'"):
        read_yaml(tmp_path / "stage11.yaml")


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("name: x\ntrain: {steps: 3\nzero: 2\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_yaml(tmp_path / "b.yaml")
    (tmp_path / "l.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="no mapping"):
        read_yaml(tmp_path / "l.yaml")


def test_configs_are_frozen() -> None:
    config = load_config(DataConfig, None, values={"train": "d"})
    with pytest.raises(ValidationError):
        config.train = "e"  # type: ignore[misc]


def test_shipped_recipes_use_no_absolute_path() -> None:
    for path in RECIPES:
        assert "=/" not in yaml.safe_dump(read_yaml(path))
        assert ": /" not in yaml.safe_dump(read_yaml(path))


TWO = [{"url": "a", "weight": 3}, {"url": "b", "weight": 0.5}]


def test_a_mixture_reads_back_equal(tmp_path: Path) -> None:
    config = run(data={"mixture": TWO})
    (tmp_path / "r.yaml").write_text(to_yaml(config))
    assert load_run(tmp_path / "r.yaml", methods=METHODS) == config
    assert [(one.url, one.weight) for one in config.data.sets] == [("a", 3), ("b", 0.5)]
    assert [(one.url, one.cache) for one in run("data.cache=c").data.sets] == [("data/train", "c")]
    changed = run("data.train=null", "data.mixture=[{url: a, weight: 3}, {url: b, weight: .5}]")
    assert changed.data == config.data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "no data is named: give 'train', the URL of a data set, or 'mixture', a list of several"),
        ({"train": "a", "mixture": TWO}, "'train' and 'mixture' are both given"),
        ({"mixture": []}, "'mixture' has two data sets or more"),
        ({"mixture": TWO[:1]}, "name a single one in 'train'"),
        ({"mixture": [TWO[0], {"url": "b", "weight": 0}]}, "'data.mixture.1.weight': Input should be greater than 0"),
        ({"mixture": [TWO[0], {"url": "b", "weight": -1}]}, "(given: -1)"),
        ({"mixture": [TWO[0], {"url": "b", "weight": ".inf"}]}, "data.mixture.1.weight"),
        ({"mixture": [TWO[0], {"url": "b"}]}, "the key 'data.mixture.1.weight' is missing"),
        (
            {"mixture": [TWO[0], {"url": "b", "wieght": 1}]},
            "Did you mean 'weight'? Known keys here: cache, url, weight",
        ),
        ({"mixture": [*TWO, {"url": "a/", "weight": 1}]}, "the data set a is twice in 'mixture'"),
        ({"mixture": [TWO[0], {"url": "b", "weight": 0.1234567}]}, "round them, for example to 960 : 40"),
        ({"mixture": TWO, "cache": "c"}, "in a mixture each data set names its own"),
        (
            {"mixture": [{"cache": "c", **TWO[0]}, TWO[1]], "placement": "cached"},
            "placement 'cached' needs 'cache' of b, the URL that `isthmus data cache` wrote",
        ),
    ],
)
def test_a_wrong_mixture_is_refused_with_what_to_do(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(data=data)
    assert says in str(refused.value)


@pytest.mark.parametrize("model", [{"name": n} for n in ("team/model", "a:b", "x@y", "o'brien", "", " a")])
def test_names_that_the_registry_cannot_have_are_refused_at_once(model: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot name a registered model"):
        run(model=model)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "a b", "x/y", ""])
def test_aliases_that_the_registry_cannot_have_are_refused_at_once(alias: str) -> None:
    with pytest.raises(ConfigError, match="is no alias"):
        run(model={"name": "bridge", "alias": alias})
    assert run(model={"name": "bridge 2.0", "alias": "v1-good"}).model is not None


MERGED = """
base: &base {lr: 1, steps: 10}
one:
  train: &one
    <<: *base
    steps: 20
    lr: 2
two:
  <<: *one
  lr: 3
  train: *one
"""


def test_a_key_that_is_there_twice_is_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: a\ntrain: {steps: 1}\ndata: &x {train: d}\ntrain: {lr: 1}\n")
    with pytest.raises(ConfigError, match="line 4, column 1 is not valid YAML: the key 'train' is there a second time"):
        read_yaml(file)
    file.write_text(MERGED)
    assert read_yaml(file)["two"] == {"train": {"lr": 2, "steps": 20}, "lr": 3, "steps": 20}
