"""Intervals of shares: known answers, coverage, captions of one image, and that results carry them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from isthmus.evaluation.classification import classification_intervals
from isthmus.evaluation.intervals import clustered, wilson
from isthmus.evaluation.retrieval import retrieve


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (3, 17), (180, 600), (1, 1)])
def test_wilson_is_scipys(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_one_caption_an_image_is_wilsons() -> None:
    hits = torch.tensor([1, 0, 0, 1, 1, 0, 0]).bool()
    assert clustered(hits, torch.arange(7), 7) == wilson(3, 7)


def test_captions_that_rise_and_fall_together_count_as_one_image() -> None:
    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.4
    once = clustered(hits, torch.arange(200), 200)
    five = clustered(hits.repeat_interleave(5), torch.arange(200).repeat_interleave(5), 200)
    assert five == pytest.approx(once, abs=0.01)
    naive = wilson(5 * int(hits.sum()), 1000)
    assert five[1] - five[0] > 1.8 * (naive[1] - naive[0])
    assert five == clustered(hits.repeat_interleave(5), torch.arange(200).repeat_interleave(5), 200)  # seeded


def test_five_independent_captions_an_image_tell_more() -> None:
    hits = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.4
    low, high = clustered(hits, torch.arange(200).repeat_interleave(5), 200)
    naive = wilson(int(hits.sum()), 1000)
    assert (low, high) == pytest.approx(naive, abs=0.012)


@pytest.mark.parametrize("all_hit", [True, False])
def test_all_or_none_is_no_point(all_hit: bool) -> None:
    hits = torch.full((40,), all_hit)
    low, high = clustered(hits, torch.arange(20).repeat_interleave(2), 20)
    assert (low, high) == wilson(20 * all_hit, 20) and high - low > 0.1


def test_it_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    random, truth, inside = np.random.default_rng(2), 0.2, 0
    for _ in range(400):
        low, high = wilson(int(random.binomial(60, truth)), 60)
        inside += low <= truth <= high
    assert 0.92 < inside / 400 < 0.98


def test_figures_lie_in_their_intervals() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.nn.functional.normalize(torch.randn(50, 1, 12, generator=generator), dim=-1)
    texts = (images[:, 0] + 0.4 * torch.randn(50, 12, generator=generator)).repeat_interleave(2, 0)
    owner = torch.arange(50).repeat_interleave(2)
    found = retrieve(images, torch.nn.functional.normalize(texts, dim=-1), owner)
    figures, intervals = found.metrics(), found.intervals()
    assert set(intervals) == {f"{way}_at_{k}_ci95" for way in ("tr", "ir") for k in (1, 5, 10)}
    for name, (low, high) in intervals.items():
        assert 0 <= low <= figures[name.removesuffix("_ci95")] <= high <= 1, name
        assert high > low
    ranks = torch.tensor([1, 2, 6, 1])
    assert classification_intervals(ranks, 10)["top_5_ci95"] == pytest.approx(list(wilson(3, 4)), abs=1e-5)
    assert set(classification_intervals(ranks, 4)) == {"top_1_ci95"}
