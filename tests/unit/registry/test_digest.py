"""A run's digest: what changes it, and which new field of a recipe does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from isthmus.config import RunConfig, load_run
from isthmus.config.later import CAME_LATER, with_later_fields
from isthmus.config.load import to_yaml
from isthmus.contracts import ModelVersion
from isthmus.methods import method_configs
from isthmus.registry.manifest import changed_fields, flatten, lineage, recipe_digest, run_identity, settled_fields

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


@pytest.mark.parametrize(
    ("made", "digest", "identity"),
    [
        (
            run,
            "d274f68fe02cc15737f35b3264ef3188f1a8fc84df23911d306aeede507d28d3",
            "39f4ae7eee46cc5dfc19e280d817a61703e0ec9646a0057f11e372aa871bc1b5",
        ),
        (
            projector,
            "220a8019ba4775753e5ff2aff29804b6b4096884ae687fd36eb5525c4ca2f22c",
            "409837b74845af90c21877ca99bd3c3d1fca8d9630c2f5f59addee4eed02944c",
        ),
    ],
)
def test_runs_that_are_on_disks_stay_what_they_are(made: Any, digest: str, identity: str) -> None:
    """Digests as runs of earlier commits have stored them. Another value here means that every finished run is trained
    anew: a new field belongs into CAME_LATER."""
    assert (recipe_digest(made(), LINEAGE), run_identity(made(), LINEAGE)["recipe"]) == (digest, identity)


@pytest.mark.parametrize("made", [run, projector])
def test_a_stored_recipe_may_lack_what_came_later(made: Any) -> None:
    new = made()
    whole = with_later_fields({"method": {"name": new.method.name, "vision": {}, "qformer": {}, "language": {}}})
    fields = [f for f in flatten(whole) if f in settled_fields(new) and f not in ("method.name", "method.language")]
    assert len(fields) >= 2 and ("method.contrast_over" in fields) == (new.method.name == "projector")
    for field in {*fields, *CAME_LATER} & settled_fields(new).keys():
        stored = yaml.safe_load(to_yaml(new))
        without(stored, field)
        loaded = load_run(None, methods=method_configs(), values=with_later_fields(stored))
        assert changed_fields(loaded, new) == [], field


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
