"""The order over several data sets: exact shares at every row, whole passes, any step by arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.config import DataConfig, SetConfig, whole_weights
from isthmus.config.mixture import MOST_PARTS
from isthmus.data import mixture
from isthmus.data.mixture import MixtureOrder, names, order_of, passes
from isthmus.data.order import Order

SETS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=2, max_size=5)
DECIMALS = st.decimals("0.01", "50", places=2).map(float)


ANY_BATCH = st.integers(1, 48)


@st.composite
def mixtures(draw: st.DrawFn, batches: st.SearchStrategy[int] = ANY_BATCH) -> MixtureOrder:
    sizes, weights = zip(*draw(SETS), strict=True)
    pool = draw(st.sampled_from([1, 16, 64, 16384]))
    return MixtureOrder(sizes, weights, draw(batches), draw(st.integers(0, 2**40)), pool)


def sets_of(order: MixtureOrder, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(order.sizes), rows, side="right")


def run(order: MixtureOrder, steps: range) -> tuple[np.ndarray, np.ndarray]:
    """(rows, visits) of ``steps``."""
    rows = np.concatenate([order.batch(step) for step in steps])
    return rows, np.concatenate([order.visits(step, 0, 1) for step in steps])


@settings(max_examples=40, deadline=None)
@given(order=mixtures(), first=st.sampled_from([0, 1, 977, 10**12]))
def test_shares_are_exact_to_less_than_a_row_at_every_row(order: MixtureOrder, first: int) -> None:
    steps = range(first, first + 2 + 60 // order.global_batch)
    turns, total = sets_of(order, run(order, steps)[0]), sum(order.weights)
    before = order.counts(first * order.global_batch)
    for number, weight in enumerate(order.weights):
        counts = int(before[number]) + np.cumsum(turns == number)
        for place, count in enumerate(counts.tolist(), start=first * order.global_batch + 1):
            assert abs(Fraction(weight * place, total) - count) < 1, (number, place)
    assert (order.counts(steps.stop * order.global_batch) - before == np.bincount(turns, minlength=len(before))).all()


@settings(max_examples=30, deadline=None)
@given(order=mixtures(st.integers(24, 96)))
def test_each_pass_over_a_set_visits_each_of_its_samples_once(order: MixtureOrder) -> None:
    rows, visits = run(order, range(1 + 480 // order.global_batch))
    assert (rows >= 0).all(), "padding in a mixture"
    start = 0
    for number, size in enumerate(order.sizes):
        here = sets_of(order, rows) == number
        own, passed = rows[here] - start, visits[here]
        start += size
        assert passed.tolist() == [place // size for place in range(len(own))]
        for first in range(0, len(own), size):
            part = own[first : first + size]
            assert len(set(part.tolist())) == len(part) and part.max() < size


@settings(max_examples=40, deadline=None)
@given(order=mixtures(st.integers(1, 12).map(lambda n: 4 * n)), step=st.integers(0, 10**9))
def test_every_world_size_gives_the_same_batch_and_each_worker_all_sets(order: MixtureOrder, step: int) -> None:
    batch, visits = order.batch(step), order.visits(step, 0, 1)
    for world in (1, 2, 4):
        parts = [order.local(step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        seen = [order.visits(step, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(seen), visits)
        for part in parts:
            counts = np.bincount(sets_of(order, part), minlength=len(order.sizes))
            for count, weight in zip(counts.tolist(), order.weights, strict=True):
                assert abs(count - Fraction(weight * len(part), sum(order.weights))) < 2


@settings(max_examples=25, deadline=None)
@given(order=mixtures(), step=st.integers(0, 10**6))
def test_a_step_does_not_depend_on_what_was_asked_before(order: MixtureOrder, step: int) -> None:
    for other in range(max(0, step - 3), step):
        order.batch(other)
    walked = order.batch(step).tolist()
    for memory in (mixture._rows_and_visits, mixture._real_rows, mixture._turns):
        memory.cache_clear()
    assert order.batch(step).tolist() == walked
    end = order.span_end(step)
    assert step < end <= step + order.span
    assert {order.span_end(other) for other in range(step, end)} == {end}


def test_seeds_and_sets_have_orders_of_their_own() -> None:
    one, other = MixtureOrder((50, 50), (1, 1), 100, 1), MixtureOrder((50, 50), (1, 1), 100, 2)
    assert one.batch(0).tolist() != other.batch(0).tolist()
    rows = one.batch(0)
    assert (rows[rows < 50]).tolist() != (rows[rows >= 50] - 50).tolist(), "two sets of one size are in step"


def test_order_is_pinned() -> None:
    """A change would silently change what a resumed run sees."""
    order = MixtureOrder((10, 4, 7), (3, 1, 2), 6, seed=7)
    assert [order.batch(step).tolist() for step in (0, 5, 10**6)] == PINNED


PINNED = [[7, 14, 6, 11, 5, 20], [6, 17, 4, 13, 3, 15], [7, 16, 0, 10, 6, 14]]


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(DECIMALS, min_size=2, max_size=4))
def test_weights_count_as_they_are_written(weights: list[float]) -> None:
    exact = [Fraction(str(weight)) for weight in weights]
    if sum(exact) * 100 > MOST_PARTS:
        return
    whole = whole_weights(weights)
    assert [Fraction(w, sum(whole)) for w in whole] == [w / sum(exact) for w in exact]
    assert np.gcd.reduce(whole) == 1


def test_weights_too_fine_are_refused_with_rounder_ones() -> None:
    assert whole_weights([0.1, 0.2, 0.3]) == (1, 2, 3) and whole_weights([3e-7, 1e-7]) == (3, 1)
    assert sum(whole_weights([MOST_PARTS - 1, 1])) == MOST_PARTS
    with pytest.raises(ValueError, match=r"333333 : 666668, whose sum is above 100000; .* example to 333 : 667"):
        whole_weights([0.333333, 0.666668])
    with pytest.raises(ValueError, match="example to 1000 : 1"):
        whole_weights([10**9, 1])


def test_a_single_set_keeps_its_order_and_logs_no_passes() -> None:
    assert order_of(DataConfig(train="d", shuffle_pool=9), [30], 4, 5) == Order(30, 4, 5, 9)
    assert passes(DataConfig(train="d"), [30], 40) == {}


def test_passes_are_logged_for_each_set_by_a_name_that_tells_it_apart() -> None:
    sets = (SetConfig(url="s3://b/coco/train", weight=3), SetConfig(url="/lake/vg/train/", weight=1))
    data = DataConfig(mixture=sets)
    assert order_of(data, [30, 20], 4, 5) == MixtureOrder((30, 20), (3, 1), 4, 5)
    assert passes(data, [30, 20], 40) == {"epoch": 40 / 50, "epoch_coco_train": 1.0, "epoch_vg_train": 0.5}
    assert names(["s3://b/a", "s3://b/c d%"]) == ["a", "c-d-"] and names(["x:", "x;"]) == ["0", "1"]
    assert order_of(data, [30, 20], 4, 5).epoch_of(25) == 2
