"""The control: every image keeps to one other image's captions, whatever the epoch, the rank and the placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_stream import make_cache, make_stage

from isthmus.config import DataConfig
from isthmus.contracts import Batch
from isthmus.data.manifest import Manifest, index
from isthmus.data.order import Order
from isthmus.data.shuffled import partners
from isthmus.data.stream import train_batches
from isthmus.errors import DataError
from isthmus.registry.manifest import data_record
from isthmus.testing.shards import make_dataset

SAMPLES, BATCH, SEED = 10, 4, 9


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", SAMPLES, per_shard=4)
    index(str(tmp_path / "data"))
    return tmp_path / "data"


def batches(url: Path, *, seed: int = SEED, world: int = 1, rank: int = 0, **data: object) -> list[Batch]:
    config = DataConfig(train=str(url), shuffled_pairs=True, **data)  # type: ignore[arg-type]
    order = Order(SAMPLES, BATCH, seed=1, pool=config.shuffle_pool)
    return list(train_batches(config, make_stage(), order, rank, world, 0, 6, seed, lambda f: None))


def pairs(url: Path, made: list[Batch]) -> set[tuple[int, int]]:
    """(number of the image, number that its caption names), as met in all batches."""
    number_of = {int(id): row for row, id in enumerate(Manifest.load(str(url)).ids)}
    return {
        (number_of[int(id)], int(text.rpartition(" ")[2]))
        for batch in made
        for id, text, valid in zip(batch.sample_ids_B, batch.texts, batch.valid_B, strict=True)
        if valid
    }


@pytest.mark.parametrize("samples", [2, 3, 10, 1001])
def test_partners_are_a_permutation_that_leaves_nothing_in_its_place(samples: int) -> None:
    found = partners(samples, SEED)
    assert sorted(found.tolist()) == list(range(samples)) and not (found == np.arange(samples)).any()
    assert np.array_equal(found, partners(samples, SEED))
    assert samples < 10 or not np.array_equal(found, partners(samples, SEED + 1))


def test_each_image_has_one_other_image_s_caption_in_every_epoch(dataset: Path) -> None:
    whole = batches(dataset)
    assert [batch.epoch for batch in whole] == [0] * 3 + [1] * 3
    assert pairs(dataset, whole) == set(enumerate(partners(SAMPLES, SEED).tolist()))
    assert pairs(dataset, batches(dataset, seed=2)) == set(enumerate(partners(SAMPLES, 2).tolist()))


def test_ranks_and_placements_have_the_same_pairs(dataset: Path, tmp_path: Path) -> None:
    wanted = set(enumerate(partners(SAMPLES, SEED).tolist()))
    halves = [batches(dataset, world=2, rank=rank) for rank in range(2)]
    assert pairs(dataset, halves[0]) | pairs(dataset, halves[1]) == wanted
    cache = make_cache(dataset, tmp_path / "cache", skip=-1)
    assert pairs(dataset, batches(dataset, placement="cached", cache=str(cache))) == wanted


def test_a_partner_that_is_not_in_the_cache_is_passed_over(dataset: Path, tmp_path: Path) -> None:
    partner = partners(SAMPLES, SEED)
    cache = make_cache(dataset, tmp_path / "cache", skip=5)
    made = pairs(dataset, batches(dataset, placement="cached", cache=str(cache), max_failed_share=0.2))
    before = int(np.flatnonzero(partner == 5)[0])
    assert (before, int(partner[5])) in made and not any(caption == 5 for _, caption in made)


def test_a_single_sample_has_no_other(tmp_path: Path) -> None:
    make_dataset(tmp_path, 1)
    index(str(tmp_path))
    data = DataConfig(train=str(tmp_path), shuffled_pairs=True)
    with pytest.raises(DataError, match="needs two samples"):
        list(train_batches(data, make_stage(), Order(1, 1), 0, 1, 0, 1, 0, lambda f: None))


def test_a_model_s_lineage_says_that_it_is_a_control() -> None:
    found = [("d" * 64, 10)]
    assert data_record(DataConfig(train="x", shuffled_pairs=True), found)["shuffled_pairs"] is True
    assert "shuffled_pairs" not in data_record(DataConfig(train="x"), found)


def test_questions_have_no_such_control(tmp_path: Path) -> None:
    """Their own would be read beside the other's caption, and the model would be marked a control that it is not."""
    index(str(make_dataset(tmp_path / "asked", SAMPLES, answers=("red", "blue"))))
    config = DataConfig(train=str(tmp_path / "asked"), shuffled_pairs=True)
    stage = replace(make_stage(), needs_questions=True)
    with pytest.raises(DataError, match="exchanges captions, and this recipe reads questions"):
        list(train_batches(config, stage, Order(SAMPLES, BATCH, seed=1), 0, 1, 0, 1, SEED, lambda f: None))
