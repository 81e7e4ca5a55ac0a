"""Batches are a function of the step; bad samples are counted, replaced and, when too many, stop the run."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.config import DataConfig, VisionConfig
from isthmus.contracts import Base, Batch, Sample, Stage, StageModule
from isthmus.data import features, local
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.prefetch import ahead, map_ahead
from isthmus.data.quarantine import FailureBudget, Quarantine, check_cut, read_quarantine
from isthmus.data.readers import Failure
from isthmus.data.stream import iter_samples, train_batches
from isthmus.data.transforms import ImageTransform
from isthmus.errors import DataError
from isthmus.methods.batching import cut_captions
from isthmus.testing.shards import image_bytes, make_dataset, write_tar

SIZE = 8


def collate(samples: list[Sample], epoch: int, step: int) -> Batch:
    pixels = samples[0].pixels_CHW is not None
    stacked = torch.from_numpy(np.stack([s.pixels_CHW if pixels else s.features_ND for s in samples]))  # type: ignore
    return Batch(
        sample_ids_B=torch.tensor([s.id for s in samples]),
        valid_B=torch.ones(len(samples), dtype=torch.bool),
        step=step,
        epoch=epoch,
        texts=tuple(s.captions[0] for s in samples),
        **{"pixels_BCHW" if pixels else "features_BND": stacked},
    )


def make_stage(bases: tuple[Base, ...] = ()) -> Stage:
    transform = ImageTransform(SIZE)
    spec = {"tokens": 2, "width": 3, "image_size": SIZE}
    return Stage(StageModule(), collate, transform, transform.augment, lambda g: {}, bases, spec)


def run(
    url: Path, samples: int, batch: int, *, world: int = 1, start: int = 0, stop: int = 6, rank: int = 0, **data: object
) -> tuple[list[Batch], list[Failure]]:
    failed: list[Failure] = []
    config = DataConfig(train=str(url), **data)  # type: ignore[arg-type]
    order = Order(samples, batch, seed=1, pool=config.shuffle_pool)
    return list(train_batches(config, make_stage(), order, rank, world, start, stop, 9, failed.append)), failed


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", 10, per_shard=4)
    index(str(tmp_path / "data"))
    return tmp_path / "data"


def test_batches_follow_the_order_and_pad_the_epochs_end(dataset: Path) -> None:
    batches, failed = run(dataset, 10, 4)
    ids = Manifest.load(str(dataset)).ids
    order = Order(10, 4, seed=1)
    assert (
        not failed and [b.step for b in batches] == list(range(6)) and [b.epoch for b in batches] == [0] * 3 + [1] * 3
    )
    for batch in batches:
        rows = order.batch(batch.step)
        assert batch.valid_B.tolist() == (rows >= 0).tolist() and len(batch) == 4
        assert batch.sample_ids_B[batch.valid_B].tolist() == ids[rows[rows >= 0]].tolist()
        assert batch.pixels_BCHW is not None and batch.pixels_BCHW.shape == (4, 3, SIZE, SIZE)


def test_ranks_together_are_one_rank_and_a_resume_is_a_seek(dataset: Path) -> None:
    whole, _ = run(dataset, 10, 4)
    ranks = [run(dataset, 10, 4, world=2, rank=rank)[0] for rank in range(2)]
    resumed, _ = run(dataset, 10, 4, start=3)
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(2)]
        valid = torch.cat([part.valid_B for part in parts])
        assert valid.tolist() == batch.valid_B.tolist()
        pixels = torch.cat([part.pixels_BCHW for part in parts])  # type: ignore[arg-type,misc]
        assert torch.equal(pixels[valid], batch.pixels_BCHW[batch.valid_B])  # type: ignore[index]
    for batch, again in zip(whole[3:], resumed, strict=True):
        assert torch.equal(batch.pixels_BCHW, again.pixels_BCHW) and batch.texts == again.texts  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", [8, 16384])
def test_what_is_read_together_changes_nothing(dataset: Path, monkeypatch: pytest.MonkeyPatch, pool: int) -> None:
    """Spans, reads within a span, and steps read alone give the same batches."""
    together, _ = run(dataset, 10, 2, stop=12, shuffle_pool=pool)
    monkeypatch.setattr(local, "READ_BYTES", 1)
    for other in (
        run(dataset, 10, 2, stop=12, shuffle_pool=pool)[0],
        run(dataset, 10, 2, start=3, stop=12, shuffle_pool=pool)[0],
    ):
        for one, two in zip(together[-len(other) :], other, strict=True):
            assert one.step == two.step and torch.equal(one.pixels_BCHW, two.pixels_BCHW)  # type: ignore[arg-type]


def test_a_recipe_may_ask_for_the_first_caption_alone(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"drawn": set(), "first": set()}

    def watching(samples: list[Sample], epoch: int, step: int) -> Batch:
        seen[mode].update(len(s.captions) for s in samples)
        assert all(s.captions[0].startswith("picture number") for s in samples)
        return collate(samples, epoch, step)

    stage = replace(make_stage(), collate=watching)
    monkeypatch.setattr(f"{__name__}.make_stage", lambda: stage)
    for mode in seen:
        run(dataset, 10, 4, captions=mode)
    assert seen == {"drawn": {2}, "first": {1}}


def test_augmentation_differs_between_epochs_and_not_between_runs(dataset: Path) -> None:
    first, second = run(dataset, 10, 10, stop=2)[0]
    by_id = [dict(zip(b.sample_ids_B.tolist(), b.pixels_BCHW, strict=True)) for b in (first, second)]  # type: ignore
    assert by_id[0].keys() == by_id[1].keys()
    assert sum(not torch.equal(by_id[0][i], by_id[1][i]) for i in by_id[0]) >= 8
    again = run(dataset, 10, 10, stop=2, decode_workers=3, prefetch=1)[0]
    assert torch.equal(first.pixels_BCHW, again[0].pixels_BCHW)  # type: ignore[arg-type]


def test_a_batch_is_drawn_as_the_recipe_says(tmp_path: Path) -> None:
    """The widest crop of a square image is all of it, so that without flips nothing is left to chance."""
    members = [
        (f"s{n}.{end}", data) for n in range(10) for end, data in (("png", image_bytes(n, (40, 40))), ("txt", b"a"))
    ]
    write_tar(tmp_path / "a.tar", members)
    index(str(tmp_path))
    whole = {"crop": (1.0, 1.0), "resize": "pillow"}
    plain, same, flipped, changed = (
        run(tmp_path, 10, 10, stop=1, **told)[0][0].pixels_BCHW
        for told in ({"augment": False}, {**whole, "flip": False}, whole, {**whole, "rand_augment": (2, 9)})
    )
    assert torch.equal(same, plain) and not torch.equal(flipped, plain)
    turned = [torch.equal(mirrored, image.flip(-1)) for mirrored, image in zip(flipped, plain, strict=True)]
    assert all(turn or torch.equal(*two) for turn, *two in zip(turned, flipped, plain, strict=True)) and any(turned)
    assert 0 < sum(torch.equal(*two) for two in zip(changed, flipped, strict=True)) < 10


def broken(folder: Path, good: int, bad: int) -> Path:
    make_dataset(folder, good)
    write_tar(folder / "zz.tar", {f"b{n}{end}": b"broken" for n in range(bad) for end in (".png", ".txt")})
    index(str(folder))
    return folder


def test_unreadable_samples_become_invalid_rows_and_are_reported(tmp_path: Path) -> None:
    folder = broken(tmp_path / "data", 9, 1)
    batches, failed = run(folder, 10, 5, stop=2, max_failed_share=0.2)
    assert sum(int(b.valid_B.sum()) for b in batches) == 9 and all(len(b) == 5 for b in batches)
    (failure,) = failed
    assert failure.key == "b0" and failure.shard == "zz.tar" and failure.offset == 512 and failure.digest
    assert "no image format" in failure.reason
    hit = next(b for b in batches if not b.valid_B.all())
    assert failure.id not in hit.sample_ids_B.tolist()


def test_a_rank_without_any_readable_row_gets_blank_ones(tmp_path: Path) -> None:
    folder = broken(tmp_path / "data", 1, 1)
    batches, failed = run(folder, 2, 2, world=2, rank=0, stop=4, max_failed_share=1.0)
    others, _ = run(folder, 2, 2, world=2, rank=1, stop=4, max_failed_share=1.0)
    blank = [b for b in batches + others if not b.valid_B.any()]
    assert len(blank) == 4 and all(b.texts == ("",) and not b.pixels_BCHW.any() for b in blank)  # type: ignore[union-attr]
    assert failed


def test_too_many_unreadable_samples_stop_the_run_with_a_summary(tmp_path: Path) -> None:
    folder = broken(tmp_path / "data", 6, 4)
    with pytest.raises(DataError, match=r"share of 0\.05 allowed: .*no image format.*first: zz\.tar at"):
        run(folder, 10, 5, max_failed_share=0.05)


def test_changed_data_and_missing_captions_are_refused(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match="start a new run"):
        run(dataset, 11, 4)
    write_tar(tmp_path / "plain" / "x.tar", {"a.png": b"x", "b.png": b"y"})
    index(str(tmp_path / "plain"), captions="optional")
    with pytest.raises(DataError, match="have no caption"):
        run(tmp_path / "plain", 2, 2)


def make_cache(dataset: Path, out: Path, *, skip: int = -1, encoder: str = "e") -> Path:
    """A finished cache whose features are the sample's row number."""
    from isthmus.data import encode

    manifest = Manifest.load(str(dataset))
    vision = VisionConfig().model_dump(mode="json")
    meta = features.CacheMeta(str(dataset), manifest.digest, encoder, "t", vision, 2, 3, "float16", 4, parts=3)
    commits = []
    for number in range(3):
        rows = range(number * 4, min(number * 4 + 4, len(manifest)))
        records = [
            Sample(int(manifest.ids[r]), manifest.table["key"][r].as_py(), (f"row {r}",)) for r in rows if r != skip
        ]
        values = np.stack([np.full((2, 3), r, np.float16) for r in rows if r != skip])
        failed = [Failure(int(manifest.ids[skip]), "k", "s", 0, "bad")] if skip in rows else []
        commits.append(encode.write_part(str(out), number, features.part_bytes(records, values), len(records), failed))
    encode._close(str(out), meta, commits, len(manifest))
    return out


def test_cached_placement_gathers_and_reports_missing_rows(dataset: Path, tmp_path: Path) -> None:
    cache = make_cache(dataset, tmp_path / "cache", skip=5)
    batches, failed = run(dataset, 10, 4, stop=3, placement="cached", cache=str(cache), max_failed_share=0.2)
    order, ids = Order(10, 4, seed=1), Manifest.load(str(dataset)).ids
    assert [f.id for f in failed] == [ids[5]]
    seen = []
    for batch in batches:
        rows = order.batch(batch.step)
        for row, valid, feature in zip(rows, batch.valid_B, batch.features_BND, strict=True):  # type: ignore[arg-type]
            assert bool(valid) == (row not in (5, -1))
            if valid:
                assert (feature == row).all()
                seen.append(int(row))
    assert sorted(seen) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_cache_of_another_encoder_or_data_set_is_refused(dataset: Path, tmp_path: Path) -> None:
    cache = make_cache(dataset, tmp_path / "cache")
    data = DataConfig(train=str(dataset), placement="cached", cache=str(cache))
    stage = make_stage((Base("vision", "w", "another"),))
    with pytest.raises(DataError, match="another encoder"):
        train_batches(data, stage, Order(10, 2), 0, 1, 0, 1, 0, lambda f: None)
    make_dataset(tmp_path / "other", 10, start=5)
    index(str(tmp_path / "other"))
    data = DataConfig(train=str(tmp_path / "other"), placement="cached", cache=str(cache))
    with pytest.raises(DataError, match="another manifest"):
        train_batches(data, make_stage(), Order(10, 2), 0, 1, 0, 1, 0, lambda f: None)


def test_iter_samples_in_manifest_order(tmp_path: Path) -> None:
    folder = broken(tmp_path / "data", 9, 1)
    manifest = Manifest.load(str(folder))
    transform = ImageTransform(SIZE)
    groups = list(iter_samples(manifest, transform=transform, batch=4))
    assert [len(g) for g in groups] == [4, 4, 2]
    flat = [item for group in groups for item in group]
    assert [item.id for item in flat] == manifest.ids.tolist() and isinstance(flat[9], Failure)
    assert flat[3].captions == ("picture number 3", "noise 3") and flat[3].pixels_CHW.shape == (3, SIZE, SIZE)  # type: ignore
    (chosen,) = iter_samples(manifest, rows=[8, 2], batch=10)
    assert [item.key for item in chosen] == ["s00008", "s00002"]
    cached = features.FeatureCache.open(str(make_cache(folder, tmp_path / "cache", skip=9)))
    flat = [item for group in iter_samples(manifest, cache=cached) for item in group]
    assert flat[4].features_ND[0, 0] == 4 and isinstance(flat[9], Failure)  # type: ignore[union-attr,index]


def test_budget_waits_for_a_sample_that_means_something() -> None:
    bad = Failure(1, "k", "s.tar", 0, "broken: x")
    budget = FailureBudget(100_000, 0.01, "data")
    budget.count(10, [bad] * 10)  # 10 of the first 10, but of 1,000 it is one in a hundred
    with pytest.raises(DataError, match="11 of 11 samples"):
        budget.count(1, [bad])
    budget = FailureBudget(100_000, 0.01, "data")
    budget.count(5000, [bad] * 50)
    with pytest.raises(DataError):
        budget.count(1, [bad])


def test_no_token_is_shorter_than_a_byte() -> None:
    """Byte-level tokenizers make several tokens of a letter outside of ASCII."""
    tokens = lambda text: [0, *text.encode(), 1]  # noqa: E731
    assert cut_captions(["一二三", "abc", "abcdefgh"], 9, tokens).tolist() == [True, False, True]


def test_cut_captions_are_borne_up_to_their_share() -> None:
    check_cut(10, 10, 100_000, 0.01, "data")  # of 1,000 it is one in a hundred
    check_cut(50, 5000, 100_000, 0.01, "data")
    check_cut(20, 20, 20, 1.0, "data")
    with pytest.raises(DataError, match=r"51 of 5000 captions .* share of 0\.01"):
        check_cut(51, 5000, 100_000, 0.01, "data")
    with pytest.raises(DataError):
        check_cut(1, 20, 20, 0.01, "data")


def test_quarantine_keeps_each_sample_once(tmp_path: Path) -> None:
    url = str(tmp_path / "q")
    assert list(read_quarantine(url)) == []
    for _ in range(2):  # two writers
        with Quarantine(url, flush_every=2) as quarantine:
            for number in (1, 2, 2, 3):
                quarantine.add(Failure(number, f"k{number}", "s", 0, "why"))
    assert sorted(f.id for f in read_quarantine(url)) == [1, 2, 3]


def test_reading_ahead_keeps_order_errors_and_cleans_up() -> None:
    assert list(ahead(range(50), 3)) == list(range(50))
    assert list(map_ahead(lambda x: x * x, range(50), 4, 2)) == [x * x for x in range(50)]

    def fails(after: int) -> Callable:
        def numbers():
            yield from range(after)
            raise DataError("stop here")

        return numbers

    taken = []
    with pytest.raises(DataError, match="stop here"):
        taken.extend(x for x in ahead(fails(4)(), 2))
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    iterator = ahead(endless(), 2)
    assert next(iterator) == 1
    iterator.close()
    assert closed.wait(10)


def test_reading_and_decoding_reach_the_store_in_whichever_process_they_run(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = ImageTransform(SIZE).augment
    named = ((str(dataset), Manifest.load(str(dataset)).digest),)
    key = "AWS_ENDPOINT_URL"
    plan = local.Plan(named, Order(10, 5), 0, 1, 9, augment, SIZE, environment={key: "http://store"})
    monkeypatch.setenv(key, "")  # so that what is there now comes back afterwards
    [raw] = plan.read(range(1))
    assert os.environ[key] == "http://store"
    os.environ[key] = ""
    local.opened.cache_clear()  # as in another process
    plan.decode(raw)
    assert os.environ[key] == "http://store"
