"""The Ray Data pipeline gives the batches that threads give, in order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.config import DataConfig
from isthmus.contracts import Batch, Sample, Stage, StageModule
from isthmus.data import stream
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.order import Order
from isthmus.data.readers import Failure
from isthmus.data.streamed import Encoding
from isthmus.data.transforms import ImageTransform
from isthmus.errors import DataError, WeightsError
from isthmus.models.vision import describe_vision
from isthmus.testing.backbones import tiny_cnn_config
from isthmus.testing.shards import make_dataset, write_tar

pytestmark = pytest.mark.ray


def stage() -> Stage:
    transform = ImageTransform(16)

    def collate(samples: list[Sample], epoch: int, step: int) -> Batch:
        return Batch(
            torch.tensor([s.id for s in samples]),
            torch.ones(len(samples), dtype=torch.bool),
            step,
            epoch,
            pixels_BCHW=torch.from_numpy(np.stack([np.asarray(s.pixels_CHW) for s in samples])),
            texts=tuple(s.captions[0] for s in samples),
        )

    spec = {"image_size": 16, "tokens": 1, "width": 1}
    return Stage(StageModule(), collate, transform, transform.augment, lambda g: {}, (), spec)


def of_features(samples: list[Sample], epoch: int, step: int) -> Batch:
    return Batch(
        torch.tensor([s.id for s in samples]),
        torch.ones(len(samples), dtype=torch.bool),
        step,
        epoch,
        features_BND=torch.from_numpy(np.stack([np.asarray(s.features_ND) for s in samples])),
    )


def batches(url: Path, order: Order, **data: Any) -> tuple[list[Batch], list[Failure]]:
    failed: list[Failure] = []
    config = DataConfig(train=str(url), decode_workers=3, **data)
    return list(stream.train_batches(config, stage(), order, 1, 2, 2, 14, 5, failed.append)), failed


def test_ray_data_equals_threads(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, 21)
    write_tar(tmp_path / "zz.tar", {"bad.png": b"broken", "bad.txt": b"words"})
    report = index(str(tmp_path))  # as Ray tasks
    assert report.samples == 22
    order = Order(22, 6, seed=2)
    monkeypatch.setattr(stream, "_WINDOW", 7)  # two pipelines, one behind the other
    on_ray, failed = batches(tmp_path, order, max_failed_share=0.5)
    monkeypatch.setattr(stream, "ray_is_up", lambda: False)
    on_threads, also_failed = batches(tmp_path, order, max_failed_share=0.5)
    assert [b.step for b in on_ray] == list(range(2, 14)) and failed == also_failed
    assert any(not b.valid_B.all() for b in on_ray)
    for one, two in zip(on_ray, on_threads, strict=True):
        assert torch.equal(one.sample_ids_B, two.sample_ids_B) and torch.equal(one.valid_B, two.valid_B)
        assert torch.equal(one.pixels_BCHW, two.pixels_BCHW) and one.texts == two.texts  # type: ignore[arg-type]


def test_encoding_actors_give_what_threads_give(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 12)
    write_tar(tmp_path / "zz.tar", {"bad.png": b"broken", "bad.txt": b"words"})
    index(str(tmp_path))
    order, told = Order(13, 4, seed=2), list[str]()
    vision = tiny_cnn_config()
    shape = describe_vision(vision)
    spec = {"image_size": 16, "tokens": shape.tokens, "width": shape.width}

    def encoded(cpus: float = 0.5) -> list[Batch]:
        data = DataConfig(train=str(tmp_path), placement="streamed", max_failed_share=0.5)
        encoding = Encoding(vision, cpus=cpus)
        seen = replace(stage(), image_spec=spec, collate=of_features)
        return list(stream.train_batches(data, seen, order, 0, 1, 1, 4, 5, lambda failure: None, encoding, told.append))

    on_ray = encoded()
    monkeypatch.setattr(stream, "ray_is_up", lambda: False)
    on_threads = encoded()
    assert len(told) == 2 and told[0] == told[1], "each run names its encoder once"
    assert [b.step for b in on_ray] == list(range(1, 4)) and any(not b.valid_B.all() for b in on_ray)
    for one, two in zip(on_ray, on_threads, strict=True):
        assert torch.equal(one.sample_ids_B, two.sample_ids_B)
        torch.testing.assert_close(one.features_BND, two.features_BND, rtol=0, atol=1e-5)
        assert one.features_BND is not None and one.features_BND[one.valid_B].abs().sum() > 0


@pytest.mark.slow
def test_an_encoder_that_cannot_be_loaded_says_why(ray_cluster: Any, tmp_path: Path) -> None:
    make_dataset(tmp_path, 4)
    index(str(tmp_path))
    data = DataConfig(train=str(tmp_path), placement="streamed")
    vision = tiny_cnn_config().model_copy(update={"weights": str(tmp_path / "nothing.safetensors")})
    rows = stream.train_batches(
        data, stage(), Order(4, 2), 0, 1, 0, 2, 0, lambda failure: None, Encoding(vision, cpus=0.5)
    )
    with pytest.raises(WeightsError, match="nothing"):
        list(rows)


def test_index_and_check_on_ray_equal_threads(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 12, per_shard=4)
    on_ray = index(str(tmp_path))
    assert check(str(tmp_path)).ok
    monkeypatch.setattr("isthmus.data.parallel.ray_is_up", lambda: False)
    assert index(str(tmp_path)) == on_ray


def test_errors_inside_a_task_stay_readable(ray_cluster: Any, tmp_path: Path) -> None:
    make_dataset(tmp_path, 8)
    index(str(tmp_path))
    manifest = Manifest.load(str(tmp_path))
    plan_order = Order(8, 2)
    source, _ = stream._image_rows(
        DataConfig(train=str(tmp_path)), stage(), manifest, plan_order, 0, 1, range(2), 0, None
    )
    make_dataset(tmp_path, 9)
    index(str(tmp_path))
    with pytest.raises(DataError, match="indexed anew"):
        list(source)
