"""The order is a permutation, independent of the world size, and reached by arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.order import PADDING, Order, mix
from isthmus.errors import DataError

ORDERS = st.builds(
    Order, st.integers(1, 700), st.integers(1, 96), st.integers(0, 2**40), st.sampled_from([1, 64, 200, 16384])
)


@settings(max_examples=80, deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 50))
def test_each_sample_once_per_epoch(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step) for step in range(first, first + order.steps_per_epoch)]
    assert {order.epoch_of(step) for step in range(first, first + order.steps_per_epoch)} == {epoch}
    assert all(len(rows) == order.global_batch for rows in batches)
    rows = np.concatenate(batches)
    assert sorted(rows[rows != PADDING].tolist()) == list(range(order.samples))
    assert all((rows != PADDING).all() for rows in batches[:-1]), "padding outside the epoch's last batch"


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 5000), world=st.integers(1, 9), share=st.integers(1, 12), step=st.integers(0, 10_000))
def test_every_world_size_gives_the_same_global_batch(samples: int, world: int, share: int, step: int) -> None:
    order = Order(samples, world * share, seed=3, pool=500)
    parts = [order.local(step, rank, world) for rank in range(world)]
    assert all(len(part) == share for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), order.batch(step))


@settings(max_examples=40, deadline=None)
@given(order=ORDERS, step=st.integers(0, 10_000))
def test_a_span_is_cut_at_its_ends_only(order: Order, step: int) -> None:
    end = order.span_end(step)
    assert step < end <= step + order.span
    assert order.epoch_of(end - 1) == order.epoch_of(step)
    assert {order.span_end(other) for other in range(step, end)} == {end}


def test_a_span_is_whole_chunks_and_its_steps_are_mixed() -> None:
    order = Order(1_000_000, 256, seed=5)
    assert (order.streams, order.chunk, order.span) == (64, 64, 64)
    begin = 10 * order.span
    batches = [order.batch(step) for step in range(begin, order.span_end(begin))]
    chunks, counts = np.unique(np.concatenate(batches) // 64, return_counts=True)
    # A block may begin and end inside a chunk: at most two cut ones for each of the 64 streams.
    assert (counts < 64).sum() <= 2 * 64 and counts.sum() == 256 * 64
    # In one batch a chunk has a few of its rows: 4 per stream are drawn from 4 or 5 chunks.
    assert np.unique(batches[0] // 64, return_counts=True)[1].max() <= 5
    assert len(np.unique(chunks // 1000)) == len(range(0, 1_000_000 // 64, 1000)), "the chunks lie all over the set"


def test_a_small_set_is_shuffled_sample_by_sample() -> None:
    rows = Order(16384, 16384, seed=5).batch(0)
    neighbours = (np.abs(np.diff(rows)) == 1).sum()
    assert neighbours < 20  # 2 are expected of a random permutation


def test_seek_far_into_a_billion_samples_touches_one_batch_only() -> None:
    order = Order(1_000_000_007, 4096, seed=11)
    step = 5 * order.steps_per_epoch + 200_000
    rows = order.batch(step)
    assert rows.dtype == np.int64 and len(np.unique(rows)) == 4096
    assert rows.min() >= 0 and rows.max() < 1_000_000_007
    # spread over the whole set: of some 512 chunks, the mean lies within 6 standard errors
    assert abs(rows.mean() / 1_000_000_007 - 0.5) < 6 * (1 / 12 / 512) ** 0.5


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
        counts[np.arange(samples), Order(samples, samples, 5).batch(epoch)] += 1
    expected = epochs / samples
    chi2 = ((counts - expected) ** 2 / expected).sum()
    freedom = (samples - 1) ** 2
    assert abs(chi2 - freedom) < 6 * (2 * freedom) ** 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 16))
def test_ranks_that_do_not_divide_the_batch_share_it_with_padding_at_the_end(
    samples: int, batch: int, world: int
) -> None:
    order = Order(samples, batch, seed=1)
    parts = [order.local(0, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {-(-batch // world)}
    joined = np.concatenate(parts)
    assert joined[:batch].tolist() == order.batch(0).tolist() and (joined[batch:] == PADDING).all()


def test_order_is_pinned() -> None:
    """A change of the permutation would silently change what a resumed run sees."""
    assert Order(10, 5, seed=7).batch(0).tolist() == PINNED[0]
    assert Order(10, 5, seed=7).batch(3).tolist() == PINNED[1]
    assert Order(1000, 8, seed=7, pool=16).batch(125 + 60).tolist() == PINNED[3]
    assert mix(1, 2, 3) == PINNED[2]


PINNED: tuple = (
    [6, 8, 1, 0, 7],
    [6, 1, 3, 7, 8],
    15020427595393229491,
    [447, 886, 182, 263, 517, 450, 703, 383],
)


def test_refusals() -> None:
    with pytest.raises(DataError, match="no samples"):
        Order(0, 4)
