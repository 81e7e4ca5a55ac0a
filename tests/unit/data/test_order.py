"""The order is a permutation, independent of the world size, and reached by arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.order import PADDING, Order, mix
from isthmus.errors import DataError


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 700), batch=st.integers(1, 96), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_each_sample_once_per_epoch(samples: int, batch: int, seed: int, epoch: int) -> None:
    order = Order(samples, batch, seed)
    first = epoch * order.steps_per_epoch
    rows = np.concatenate([order.batch(step) for step in range(first, first + order.steps_per_epoch)])
    assert {order.epoch_of(step) for step in range(first, first + order.steps_per_epoch)} == {epoch}
    assert len(rows) == order.steps_per_epoch * batch
    real = rows[rows != PADDING]
    assert sorted(real.tolist()) == list(range(samples))
    # padding only at the very end of the epoch
    assert (rows[:samples] != PADDING).all() and (rows[samples:] == PADDING).all()


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 5000), world=st.integers(1, 9), share=st.integers(1, 12), step=st.integers(0, 10_000))
def test_every_world_size_gives_the_same_global_batch(samples: int, world: int, share: int, step: int) -> None:
    order = Order(samples, world * share, seed=3)
    parts = [order.local(step, rank, world) for rank in range(world)]
    assert all(len(part) == share for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


def test_seek_far_into_a_billion_samples_touches_one_batch_only() -> None:
    order = Order(1_000_000_007, 4096, seed=11)
    step = 5 * order.steps_per_epoch + 200_000
    rows = order.batch(step)
    assert rows.dtype == np.int64 and len(np.unique(rows)) == 4096
    assert rows.min() >= 0 and rows.max() < 1_000_000_007
    # spread over the whole set, not a neighbourhood: the mean of 4096 uniform draws lies within 6 standard errors
    assert abs(rows.mean() / 1_000_000_007 - 0.5) < 6 * (1 / 12) ** 0.5 / 64


def test_orders_differ_by_seed_and_epoch() -> None:
    order = Order(1000, 1000, seed=1)
    assert not np.array_equal(order.batch(0), order.batch(1))
    assert not np.array_equal(order.batch(0), Order(1000, 1000, seed=2).batch(0))
    np.testing.assert_array_equal(order.batch(7), Order(1000, 1000, seed=1).batch(7))


@pytest.mark.parametrize("samples", [3, 8, 13, 100])
def test_every_sample_is_as_likely_at_every_position(samples: int) -> None:
    """Chi-square of (position, sample) counts over many epochs, against 6 standard deviations of its distribution."""
    epochs = 800
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), Order(samples, samples, 5).permute(epoch, np.arange(samples))] += 1
    expected = epochs / samples
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (samples - 1) ** 2
    assert abs(chi2 - freedom) < 6 * (2 * freedom) ** 0.5


def test_order_is_pinned() -> None:
    """A change of the permutation would silently change what a resumed run sees."""
    assert Order(10, 5, seed=7).batch(0).tolist() == PINNED[0]
    assert Order(10, 5, seed=7).batch(3).tolist() == PINNED[1]
    assert mix(1, 2, 3) == PINNED[2]


PINNED: tuple = ([9, 0, 7, 1, 6], [2, 9, 1, 8, 5], 15020427595393229491)


def test_refusals() -> None:
    with pytest.raises(DataError, match="does not divide among 3 ranks"):
        Order(10, 4).local(0, 0, 3)
    with pytest.raises(DataError, match="no samples"):
        Order(0, 4)
