"""The Ray Data pipeline gives the batches that threads give, in order."""

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.config import DataConfig
from isthmus.contracts import Batch, Sample, Stage, StageModule
from isthmus.data import on_ray as on_ray_rows
from isthmus.data import stream
from isthmus.data.manifest import Manifest, check, index
from isthmus.data.mixture import order_of
from isthmus.data.order import Order
from isthmus.data.readers import Failure
from isthmus.data.sets import Sets
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
    monkeypatch.setattr(on_ray_rows, "_WINDOW", 7)  # two pipelines, one behind the other
    on_ray, failed = batches(tmp_path, order, max_failed_share=0.5)
    monkeypatch.setattr(stream, "ray_is_up", lambda: False)
    on_threads, also_failed = batches(tmp_path, order, max_failed_share=0.5)
    assert [b.step for b in on_ray] == list(range(2, 14)) and failed == also_failed
    assert any(not b.valid_B.all() for b in on_ray)
    for one, two in zip(on_ray, on_threads, strict=True):
        assert torch.equal(one.sample_ids_B, two.sample_ids_B) and torch.equal(one.valid_B, two.valid_B)
        assert torch.equal(one.pixels_BCHW, two.pixels_BCHW) and one.texts == two.texts  # type: ignore[arg-type]


def test_a_mixture_through_ray_data_equals_threads(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [{"url": str(tmp_path / name), "weight": weight} for name, weight in (("large", 0.75), ("small", 0.25))]
    for one, samples in zip(sets, (11, 3), strict=True):
        index(str(make_dataset(Path(str(one["url"])), samples)))  # the same shards and keys
    config = DataConfig(mixture=sets)  # type: ignore[arg-type]
    order = order_of(config, (11, 3), 8, 2)

    def found() -> list[Batch]:
        return list(stream.train_batches(config, stage(), order, 1, 2, 1, 8, 5, lambda failure: None))

    monkeypatch.setattr(on_ray_rows, "_WINDOW", 3)
    on_ray = found()
    monkeypatch.setattr(stream, "ray_is_up", lambda: False)
    on_threads = found()
    assert [b.step for b in on_ray] == list(range(1, 8))
    for one, two in zip(on_ray, on_threads, strict=True):
        assert torch.equal(one.sample_ids_B, two.sample_ids_B) and one.texts == two.texts
        assert torch.equal(one.pixels_BCHW, two.pixels_BCHW)  # type: ignore[arg-type]
    seen = {i for batch in on_ray for i in batch.sample_ids_B.tolist()}
    assert len(seen) > 11, "samples of both sets, told apart"


DEADLY = (13, 13)


def _plain(image: Any, seed: int) -> np.ndarray:
    if image.size == DEADLY:
        os._exit(1)
    return ImageTransform(16)(image)


@pytest.mark.slow  # five processes end and start; `make chaos` has it too
def test_an_image_that_ends_its_process_is_set_aside_and_the_rest_goes_on(ray_cluster: Any, tmp_path: Path) -> None:
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    make_dataset(tmp_path, 7)
    picture = io.BytesIO()
    Image.new("RGB", DEADLY).save(picture, "PNG")
    write_tar(tmp_path / "zz.tar", {"zz.png": picture.getvalue(), "zz.txt": b"words"})
    index(str(tmp_path))
    failed: list[Failure] = []
    config, order = DataConfig(train=str(tmp_path), max_failed_share=0.5), Order(8, 4, seed=2)
    stopping = replace(stage(), augment=_plain)
    found = list(stream.train_batches(config, stopping, order, 0, 1, 0, 4, 5, failed.append))
    assert [batch.step for batch in found] == list(range(4))
    assert sorted(failure.key for failure in failed) == ["zz", "zz"], "one a pass"
    assert all("ended the process" in failure.reason and len(failure.digest) == 64 for failure in failed)
    ids = Manifest.load(str(tmp_path)).ids
    for epoch in (found[:2], found[2:]):
        seen = [i for batch in epoch for i in batch.sample_ids_B[batch.valid_B].tolist()]
        assert sorted(seen) == sorted(ids[:7].tolist())


def test_tasks_that_die_through_no_image_s_fault_stop_the_run_with_a_sentence(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, 4)
    index(str(tmp_path))

    def dead(*_: Any) -> Any:
        raise ray_cluster.exceptions.WorkerCrashedError
        yield

    monkeypatch.setattr(on_ray_rows, "_pipeline", dead)
    rows = stream.train_batches(
        DataConfig(train=str(tmp_path)), stage(), Order(4, 2), 0, 1, 0, 2, 0, lambda failure: None
    )
    with pytest.raises(DataError, match="died 3 times"):
        list(rows)


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
        DataConfig(train=str(tmp_path)), stage(), Sets((manifest,)), plan_order, 0, 1, range(2), 0, None
    )
    make_dataset(tmp_path, 9)
    index(str(tmp_path))
    with pytest.raises(DataError, match="indexed anew"):
        list(source)
