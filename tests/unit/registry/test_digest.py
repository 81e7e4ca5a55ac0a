"""A run's digest: what changes it, and which new field of a recipe does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.config import RunConfig, load_run
from isthmus.config.later import CAME_LATER, later_fields, with_later_fields
from isthmus.config.load import to_yaml
from isthmus.contracts import ModelVersion
from isthmus.methods import method_configs
from isthmus.registry.manifest import changed_fields, lineage, recipe_digest, run_identity, settled_fields

LINEAGE: dict[str, Any] = {"data": {"digest": "d"}, "parent": {"name": "bridge", "version": "3"}}


def run(**language: Any) -> RunConfig:
    method = {
        "name": "blip2_stage2",
        "language": {"prompt": "a photo of", **language},
        "qformer": {"init_segment": "fold"},
    }
    values = {
        "name": "demo", "method": method,
        "data": {"train": "data", "resize": "pillow"}, "train": {"steps": 3, "global_batch": 4},
    }  # fmt: skip
    return load_run(None, methods=method_configs(), values=values)


def without(recipe: dict[str, Any], field: str) -> None:
    *sections, key = field.split(".")
    for section in sections:
        recipe = recipe[section]
    del recipe[key]


def projector() -> RunConfig:
    values = {
        "name": "demo", "method": {"name": "projector", "vision": {}},
        "data": {"train": "data", "resize": "pillow"}, "train": {"steps": 3, "global_batch": 4},
    }  # fmt: skip
    return load_run(None, methods=method_configs(), values=values)


@pytest.mark.parametrize("made", [run, projector])
def test_a_run_that_ended_before_a_field_existed_still_has(made: Any) -> None:
    """Its digest was made of a recipe without the field, and its stored recipe lacks it."""
    new = made()
    later = later_fields(new.method.name)
    there = [field for field in later if field in settled_fields(new)]
    assert len(there) > 8 and ("method.contrast_over" in there) == (new.method.name == "projector")
    others = {name: value for name, value in settled_fields(new).items() if name not in later}
    facts = {"recipe": others, "data": "d", "parent": ["bridge", "3"]}
    assert recipe_digest(new, LINEAGE) == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    fixed = {name: value for name, value in others.items() if name not in ("name", "train.steps", "zero.stage")}
    expected = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
    assert run_identity(new, LINEAGE)["recipe"] == expected
    for field in there:
        stored = yaml.safe_load(to_yaml(new))
        without(stored, field)
        loaded = load_run(None, methods=method_configs(), values=with_later_fields(stored))
        assert changed_fields(loaded, new) == [], field


def test_every_later_field_is_one_of_a_recipe() -> None:
    known = {*settled_fields(run()), *settled_fields(projector())}
    assert {*CAME_LATER, *later_fields("projector")} <= known


def test_a_parent_in_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    digests = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        parent = ModelVersion("artefact", "", "", str(tmp_path), str(tmp_path), {})
        digests.append(recipe_digest(run(), lineage(data={"digest": "d"}, parent=parent)))
    assert digests[0] == digests[2] != digests[1]
    registered = ModelVersion("bridge", "3", "", "models:/bridge/3", str(tmp_path), {})
    assert lineage(data={}, parent=registered)["parent"] == {
        "name": "bridge",
        "version": "3",
        "uri": "models:/bridge/3",
    }


def test_another_value_than_the_old_one_is_another_run() -> None:
    assert recipe_digest(run(), LINEAGE) == recipe_digest(run(max_length_of="caption"), LINEAGE)
    assert recipe_digest(run(), LINEAGE) != recipe_digest(run(max_length_of="text"), LINEAGE)
    assert changed_fields(run(), run(max_length_of="text")) == [
        "method.language.max_length_of: was 'caption', is 'text'"
    ]


def test_a_run_may_go_on_under_another_zero_stage_and_with_other_workers() -> None:
    before = run()
    cluster = before.cluster.model_copy(update={"workers": 4})
    after = before.model_copy(update={"zero": before.zero.model_copy(update={"stage": 3}), "cluster": cluster})
    assert before.zero.stage != 3 and changed_fields(before, after) == []
