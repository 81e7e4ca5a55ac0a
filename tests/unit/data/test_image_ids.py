"""Samples of one image know it: from the shards' own image_id through the manifest to every placement's batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from isthmus.config import DataConfig
from isthmus.contracts import Base, Batch, Sample, Stage, StageModule
from isthmus.data.features import build_cache, part_bytes
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.scan import image_id
from isthmus.data.stream import train_batches
from isthmus.data.transforms import ImageTransform
from isthmus.errors import DataError
from isthmus.methods.batching import stack
from isthmus.testing.backbones import tiny_vision_config
from isthmus.testing.shards import image_bytes, write_tar

SIZE = 8


def pairs(folder: Path, images: int = 4, captions: int = 2, first: int = 1, name: str = "a.tar") -> Path:
    """A tar in which each caption of an image is a sample of its own, as COCO is often stored."""
    members = {}
    for n in range(images * captions):
        members[f"c{n}.png"] = image_bytes(n // captions)
        members[f"c{n}.json"] = json.dumps({"caption": f"caption {n}", "image_id": first + n // captions}).encode()
    write_tar(folder / name, members)
    return folder


def as_before(folder: Path) -> None:
    """The manifest as it was written before it named images."""
    file = folder / "manifest.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["image_id"]), file)


def collate(samples: list[Sample], epoch: int, step: int) -> Batch:
    return Batch(**stack(samples, step, epoch), texts=tuple(sample.captions[0] for sample in samples))


def make_stage(bases: tuple[Base, ...] = (), *, needs: bool = True) -> Stage:
    transform = ImageTransform(SIZE)
    spec = {"tokens": 2, "width": 3, "image_size": SIZE}
    return Stage(StageModule(), collate, transform, transform.augment, lambda g: {}, bases, spec, needs_image_ids=needs)


def batches(folder: Path, rows: int, batch: int = 4, *, needs: bool = True, **options: Any) -> list[Batch]:
    config, order = DataConfig(train=str(folder), **options), Order(rows, batch, seed=1)
    return list(train_batches(config, make_stage(needs=needs), order, 0, 1, 0, 2, 9, lambda f: None))


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), (7, 7), (0, 0), (-3, -3), (42.0, 42), (-(1 << 63), -(1 << 63)), ((1 << 63) - 1, (1 << 63) - 1)],
)
def test_integers_are_taken_as_they_are(given: Any, found: int | None) -> None:
    assert image_id(given) == found


def test_texts_and_large_integers_are_hashed_into_63_bits() -> None:
    texts = [image_id("a.jpg"), image_id("b.jpg"), image_id(1 << 70)]
    assert len(set(texts)) == 3 and all(t is not None and 0 <= t < 1 << 63 for t in texts)
    assert image_id("a.jpg") == texts[0]


@pytest.mark.parametrize("given", [True, "", 1.5, float("nan"), float("inf"), [1], {"a": 1}])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="neither an integer nor a text"):
        image_id(given)


def test_a_tars_json_names_images_and_others_count_for_themselves(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {"image_id": 5},
        "b": {"image_id": 5},
        "c": {"image_id": "x.jpg"},
        "d": {"image_id": "x.jpg"},
        "e": {"number": 5},
        "f": {"image_id": [5]},
    }
    members = {}
    for n, (key, meta) in enumerate(rows.items()):
        members |= {f"{key}.png": image_bytes(n), f"{key}.txt": b"words", f"{key}.json": json.dumps(meta).encode()}
    members |= {"g.png": image_bytes(9), "g.txt": b"words"}
    write_tar(tmp_path / "a.tar", members)
    pairs(tmp_path, images=1, captions=1, first=5, name="b.tar")  # an image may lie in two shards
    report = index(str(tmp_path))
    manifest = Manifest.load(str(tmp_path))
    found = dict(zip(manifest.table["key"].to_pylist(), manifest.image_ids.tolist(), strict=True))
    own = dict(zip(manifest.table["key"].to_pylist(), manifest.ids.tolist(), strict=True))
    assert found["a"] == found["b"] == found["c0"] == 5
    assert found["c"] == found["d"] == image_id("x.jpg")
    assert {key: found[key] for key in "efg"} == {key: own[key] for key in "efg"}
    assert report.samples == 8 and [(p.key, "neither an integer" in p.reason) for p in report.problems] == [("f", True)]


def test_a_parquet_column_names_images_and_may_be_the_only_key(tmp_path: Path) -> None:
    rows = [{"image": image_bytes(n // 2), "caption": f"c{n}", "image_id": 70 + n // 2} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    keyed = [{**row, "key": f"k{n}", "image_id": [1.0, 1.0, None, 2.0][n]} for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(keyed), tmp_path / "b.parquet")
    report = index(str(tmp_path))
    manifest = Manifest.load(str(tmp_path))
    assert not report.problems and report.samples == 8
    assert manifest.table["key"].to_pylist() == ["70", "70#2", "71", "71#2", "k0", "k1", "k2", "k3"]
    assert manifest.image_ids.tolist() == [70, 70, 71, 71, 1, 1, manifest.ids[6], 2]


def test_a_manifest_of_before_is_the_same_data_without_images(tmp_path: Path) -> None:
    digest = index(str(pairs(tmp_path))).digest
    named = Manifest.load(str(tmp_path))
    as_before(tmp_path)
    before = Manifest.load(str(tmp_path))
    assert before.digest == named.digest == digest and named.names_images and not before.names_images
    assert (before.image_ids == before.ids).all() and len(set(named.image_ids)) == 4
    for batch in batches(tmp_path, 8, needs=False):
        assert torch.equal(batch.image_ids_B, batch.sample_ids_B)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data index .* again; its digest stays"):
        batches(tmp_path, 8)


def test_inline_and_cached_batches_carry_the_same_images(tmp_path: Path) -> None:
    digest = index(str(pairs(tmp_path / "data"))).digest
    as_before(tmp_path / "data")  # the cache is of before, too, and stays valid
    build_cache(str(tmp_path / "data"), str(tmp_path / "cache"), tiny_vision_config(), actors=0)
    assert index(str(tmp_path / "data")).digest == digest
    manifest = Manifest.load(str(tmp_path / "data"))
    of = dict(zip(manifest.ids.tolist(), manifest.image_ids.tolist(), strict=True))
    inline = batches(tmp_path / "data", 8, 6)
    cached = batches(tmp_path / "data", 8, 6, placement="cached", cache=str(tmp_path / "cache"))
    for one, two in zip(inline, cached, strict=True):
        assert one.image_ids_B is not None and torch.equal(one.image_ids_B, two.image_ids_B)  # type: ignore[arg-type]
        assert one.image_ids_B.tolist() == [of[i] for i in one.sample_ids_B.tolist()]
        assert one.texts == two.texts
    assert {len(set(b.image_ids_B.tolist())) for b in inline} <= {1, 2, 3, 4}  # type: ignore[union-attr]
    one = Sample(1, "k", ("c",))
    values = torch.zeros(1, 2, 3).numpy()
    assert part_bytes([one], values) == part_bytes([replace(one, image_id=9)], values)


def test_data_without_shared_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index(str(pairs(tmp_path / "one", images=4, captions=1)))
    index(str(pairs(tmp_path / "two")))
    batches(tmp_path / "one", 4, needs=False)
    batches(tmp_path / "two", 8)
    assert not caplog.records
    batches(tmp_path / "one", 4)
    assert ["has no effect" in record.getMessage() for record in caplog.records] == [True]
