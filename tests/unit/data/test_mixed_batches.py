"""Batches of several data sets: both are read, told apart, counted, cached and named."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.config import DataConfig, SetConfig
from isthmus.contracts import Batch, Sample, Stage, StageModule
from isthmus.data import local
from isthmus.data.features import FeatureCache, build_cache
from isthmus.data.manifest import Manifest, index
from isthmus.data.mixture import order_of
from isthmus.data.readers import Failure
from isthmus.data.sets import Sets
from isthmus.data.stream import train_batches
from isthmus.data.transforms import ImageTransform
from isthmus.errors import DataError
from isthmus.methods.batching import choose_caption, split_caption, stack
from isthmus.testing.backbones import tiny_cnn_config
from isthmus.testing.shards import image_bytes, make_dataset, write_tar

LARGE, SMALL = 21, 5


def collate(samples: list[Sample], epoch: int, step: int) -> Batch:
    return Batch(**stack(samples, step, epoch), texts=tuple(choose_caption(s, 3, epoch) for s in samples))


def make_stage(**facts: Any) -> Stage:
    transform = ImageTransform(8)
    spec = {"tokens": 1, "width": 1, "image_size": 8}
    return Stage(StageModule(), collate, transform, transform.augment, lambda g: {}, (), spec, **facts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets whose shards and keys, and so whose ids, are the same as far as they go."""
    folder = tmp_path_factory.mktemp("sets")
    for name, samples in (("large", LARGE), ("small", SMALL)):
        index(str(make_dataset(folder / name, samples)))
    return folder


def mixed(root: Path, *names: str, weights: tuple[float, ...] = (3, 1), **data: Any) -> DataConfig:
    caches = data.pop("caches", (None, None))
    sets = [
        SetConfig(url=str(root / name), weight=weight, cache=cache)
        for name, weight, cache in zip(names or ("large", "small"), weights, caches, strict=True)
    ]
    return DataConfig(mixture=tuple(sets), **data)


def run(
    data: DataConfig, steps: range, *, batch: int = 8, rank: int = 0, world: int = 1, stage: Stage | None = None
) -> tuple[list[Batch], list[Failure]]:
    failed: list[Failure] = []
    order = order_of(data, [len(Manifest.load(one.url)) for one in data.sets], batch, seed=1)
    made = train_batches(data, stage or make_stage(), order, rank, world, steps.start, steps.stop, 9, failed.append)
    return list(made), failed


def same(one: Batch, two: Batch) -> bool:
    tensors = ("sample_ids_B", "valid_B", "pixels_BCHW", "features_BND")
    pairs = [(getattr(one, name), getattr(two, name)) for name in tensors]
    return one.texts == two.texts and all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_batches_hold_the_shares_and_ids_that_differ_between_sets(root: Path) -> None:
    batches, failed = run(mixed(root), range(7))
    manifests = [Manifest.load(str(root / name)) for name in ("large", "small")]
    assert set(manifests[1].ids.tolist()) < set(manifests[0].ids.tolist()), "the sets' own ids do not collide"
    ids = Sets(tuple(manifests))
    known = {ids.unique_id(row, int(own)): row for row, own in enumerate(np.concatenate([m.ids for m in manifests]))}
    assert len(known) == LARGE + SMALL and min(known) >= 0 and not failed
    for batch in batches:
        rows = [known[i] for i in batch.sample_ids_B.tolist()]
        assert sum(row < LARGE for row in rows) == 6 and batch.valid_B.all() and len(batch) == 8
    seen = Counter(known[i] for batch in batches for i in batch.sample_ids_B.tolist())
    assert [seen[row] for row in range(LARGE)] == [2] * LARGE  # 42 rows of 21
    assert sorted(seen[row] for row in range(LARGE, LARGE + SMALL)) == [2, 3, 3, 3, 3]  # 14 rows of 5
    assert [batch.epoch for batch in batches] == [8 * step // (LARGE + SMALL) for step in range(7)]


def test_workers_resuming_and_reading_together_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mixed(root)
    whole, _ = run(data, range(7))
    assert all(same(a, b) for a, b in zip(whole[3:], run(data, range(3, 7))[0], strict=True))
    ranks = [run(data, range(7), rank=rank, world=4)[0] for rank in range(4)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(4)]
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), batch.sample_ids_B)
        assert torch.equal(torch.cat([part.pixels_BCHW for part in parts]), batch.pixels_BCHW)  # type: ignore
    monkeypatch.setattr(local, "READ_BYTES", 1)
    assert all(same(a, b) for a, b in zip(whole, run(data, range(7))[0], strict=True))


def test_a_sample_is_augmented_and_captioned_anew_at_each_visit(root: Path) -> None:
    batches, _ = run(mixed(root, weights=(1, 9)), range(20))
    order = order_of(mixed(root, weights=(1, 9)), (LARGE, SMALL), 8, 1)
    seen: dict[int, dict[int, tuple[str, bytes]]] = {}
    for batch in batches:
        visits = order.visits(batch.step, 0, 1).tolist()
        assert batch.pixels_BCHW is not None
        for id, visit, text, pixels in zip(
            batch.sample_ids_B.tolist(), visits, batch.texts, batch.pixels_BCHW, strict=True
        ):
            seen.setdefault(id, {})[visit] = (text, pixels.numpy().tobytes())
    often = [of for of in seen.values() if len(of) > 20]
    assert len(often) == SMALL, "144 rows of 5 samples"
    for of in often:
        texts = [text for text, _ in of.values()]
        assert 4 < sum(text.startswith("noise") for text in texts) < len(texts) - 4
        assert len({pixels for _, pixels in of.values()}) > len(of) - 4
    assert batches[-1].epoch == 5, "far fewer than the visits: the epoch is no key to draw by"


def test_what_is_drawn_for_a_sample_hangs_on_its_visit_where_it_has_one() -> None:
    sample = Sample(5, "k", tuple(f"caption {n}" for n in range(9)))
    by_epoch = [choose_caption(sample, 0, epoch) for epoch in range(40)]
    assert by_epoch == [choose_caption(replace(sample, visit=visit), 0, 7) for visit in range(40)]
    assert (sample.visit_in(4), replace(sample, visit=0).visit_in(4)) == (4, 0)
    assert len({split_caption("a b c d e f g h", 5, 0, visit) for visit in range(40)}) == 8


def test_a_cache_of_each_set_gives_the_batches_that_images_give(root: Path, tmp_path: Path) -> None:
    caches = (str(tmp_path / "a"), str(tmp_path / "b"))
    for name, cache in zip(("large", "small"), caches, strict=True):
        build_cache(str(root / name), cache, tiny_cnn_config(), actors=0, dtype="float32")
    cached = mixed(root, caches=caches, placement="cached")
    fed, _ = run(cached, range(5))
    plain, _ = run(mixed(root, augment=False), range(5))
    held = [FeatureCache.open(cache) for cache in caches]
    features = np.concatenate([cache.rows(cache.ids) for cache in held])  # in the order of the manifests
    order = order_of(cached, (LARGE, SMALL), 8, 1)
    for one, two in zip(fed, plain, strict=True):
        assert torch.equal(one.sample_ids_B, two.sample_ids_B) and one.texts == two.texts
        assert one.features_BND is not None
        assert np.array_equal(one.features_BND.numpy(), features[order.batch(one.step)])  # type: ignore[attr-defined]
    swapped = mixed(root, caches=caches[::-1], placement="cached")
    with pytest.raises(DataError, match="made with another manifest"):
        run(swapped, range(1))
    build_cache(str(root / "small"), str(tmp_path / "half"), tiny_cnn_config(), actors=0, dtype="float16")
    with pytest.raises(DataError, match="do not go together: their dtype is float32 and float16"):
        run(mixed(root, caches=(caches[0], str(tmp_path / "half")), placement="cached"), range(1))


def test_a_failure_names_its_set_and_counts_over_all(root: Path, tmp_path: Path) -> None:
    bad = make_dataset(tmp_path / "bad", 3)
    write_tar(bad / "zz.tar", {"b.png": b"broken", "b.txt": b"words"})
    index(str(bad))
    data = mixed(tmp_path, str(root / "large"), "bad", max_failed_share=0.5)
    batches, failed = run(data, range(4))
    assert failed and {failure.shard for failure in failed} == {f"{bad}/zz.tar"}
    assert {failure.id for failure in failed} == {int(Manifest.load(str(bad)).ids[3])}
    assert sum(int((~batch.valid_B).sum()) for batch in batches) == len(failed)
    with pytest.raises(DataError, match=rf"read from {root}/large, {bad} are unreadable.*first: {bad}/zz\.tar at"):
        run(mixed(tmp_path, str(root / "large"), "bad", max_failed_share=0.01), range(4))


def test_images_are_told_apart_between_sets_and_known_within_one(root: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        members: dict[str, bytes] = {}
        for number in range(4):
            members |= {f"k{number}.png": image_bytes(number), f"k{number}.txt": f"{name} {number}".encode()}
            members[f"k{number}.json"] = b'{"image_id": %d}' % (number // 2)
        write_tar(tmp_path / name / "s.tar", members)
        index(str(tmp_path / name))
    [batch], _ = run(mixed(tmp_path, "a", "b", weights=(1, 1)), range(1), stage=make_stage(needs_image_ids=True))
    images = dict(zip(batch.texts, batch.image_ids_B.tolist(), strict=True))  # type: ignore[union-attr]
    assert len(images) == 8 and len(set(images.values())) == 4
    assert images["a 0"] == images["a 1"] != images["a 2"] and images["a 0"] != images["b 0"]


def test_a_set_smaller_than_its_share_of_a_batch_is_told_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches, _ = run(mixed(root, weights=(1, 3)), range(2))
        assert "small has 5 samples, and its weight gives it 6 rows of each global batch" in caplog.text
        caplog.clear()
        run(mixed(root), range(1))
    assert not caplog.text
    assert len(set(batches[0].sample_ids_B.tolist())) < 8


def test_each_set_is_checked(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"small holds 5 samples, the run's order was drawn over 6"):
        order = order_of(mixed(root), (LARGE, SMALL + 1), 8, 1)
        train_batches(mixed(root), make_stage(), order, 0, 1, 0, 1, 0, lambda f: None)
    write_tar(tmp_path / "plain" / "x.tar", {"a.png": image_bytes(1), "b.png": image_bytes(2)})
    index(str(tmp_path / "plain"), captions="optional")
    with pytest.raises(DataError, match=r"2 of the 2 samples of .*plain have no caption"):
        run(mixed(tmp_path, str(root / "large"), "plain"), range(1))
