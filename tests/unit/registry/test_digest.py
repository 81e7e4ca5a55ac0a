"""A run's digest: what changes it, and which new field of a recipe does not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import yaml

from isthmus.config import RunConfig, load_run
from isthmus.config.load import to_yaml
from isthmus.methods import method_configs
from isthmus.registry.manifest import CAME_LATER, changed_fields, recipe_digest, settled_fields, with_later_fields

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


@pytest.mark.parametrize("field", sorted(CAME_LATER))
def test_a_run_that_ended_before_the_field_existed_still_has(field: str) -> None:
    """Its digest was made of a recipe without the field, and its stored recipe lacks it."""
    new = run()
    old = {name: value for name, value in settled_fields(new).items() if name != field}
    assert len(old) == len(settled_fields(new)) - 1
    others = {name: value for name, value in old.items() if name not in CAME_LATER}
    facts = {"recipe": others, "data": "d", "parent": ["bridge", "3"]}
    assert recipe_digest(new, LINEAGE) == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    stored = yaml.safe_load(to_yaml(new))
    without(stored, field)
    loaded = load_run(None, methods=method_configs(), values=with_later_fields(stored))
    assert changed_fields(loaded, new) == []


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
