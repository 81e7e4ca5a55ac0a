"""Relative paths are resolved once, where the user typed them."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.config import CaptionConfig, DataConfig, ServeConfig, TrackingConfig, VisionConfig, absolute, anchored
from isthmus.errors import ConfigError

BASE = Path("/base/folder")
SCRATCH = Path("/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_1")


def test_only_relative_paths_change() -> None:
    config = CaptionConfig(model="models:/m@a", data="lake", out="s3://bucket/out", cache="/abs/cache")
    done = anchored(config, BASE)
    assert (done.model, done.data, done.out, done.cache) == (
        "models:/m@a",
        "/base/folder/lake",
        "s3://bucket/out",
        "/abs/cache",
    )
    assert done.tracking.uri is None and anchored(done, Path("/elsewhere")) == done


def test_sections_mappings_and_sqlite_files_are_followed() -> None:
    tracking = TrackingConfig(uri="sqlite:///runs/mlflow.db")
    done = anchored(ServeConfig(models={"a": "models:/m/1", "b": "out/artefact"}, tracking=tracking), BASE)
    assert done.models == {"a": "models:/m/1", "b": "/base/folder/out/artefact"}
    assert done.tracking.uri == "sqlite:////base/folder/runs/mlflow.db"


def test_the_sets_of_a_mixture_are_followed() -> None:
    sets = [{"url": "a", "weight": 1, "cache": "c"}, {"url": "s3://b/x", "weight": 2}]
    done = anchored(DataConfig.model_validate({"mixture": sets}), BASE)
    assert [(one.url, one.cache) for one in done.sets] == [("/base/folder/a", "/base/folder/c"), ("s3://b/x", None)]


@pytest.mark.parametrize("weights", ["random", "timm", "pkg:efficientnet-lite0"])
def test_names_of_weights_are_no_paths(weights: str) -> None:
    assert anchored(VisionConfig(weights=weights), BASE).weights == weights


def test_weights_in_a_file_are() -> None:
    assert anchored(VisionConfig(weights="my/vit.safetensors"), BASE).weights == "/base/folder/my/vit.safetensors"


def test_a_submitted_job_may_read_its_own_files_but_not_leave_results_among_them() -> None:
    assert absolute("data", "sample", base=SCRATCH) == f"{SCRATCH}/sample"
    with pytest.raises(ConfigError, match=r"'out' is the relative path runs.*deletes.*out=s3://bucket/runs"):
        absolute("out", "runs", written=True, base=SCRATCH)
