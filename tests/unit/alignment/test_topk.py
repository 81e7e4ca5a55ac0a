"""Streaming candidates equal a full sort, in any order and cut; the assignment is one, capped, and rarest first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.alignment import topk
from isthmus.alignment.topk import Candidates, Collector, assign, best


@st.composite
def scored(draw: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Ids in any order, scores of few values so that there are ties, how many to keep, and a seed."""
    samples, classes = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = random.choice(1000, samples, replace=False).astype(np.int64) - 500
    levels = draw(st.integers(1, 30))
    scores = (random.integers(-levels, levels + 1, (samples, classes)) / levels).astype(np.float32)
    return ids, scores, draw(st.integers(1, 45)), draw(st.integers(0, 1000))


def streamed(ids: np.ndarray, scores: np.ndarray, top: int, batch: int, **how: Any) -> Candidates:
    collector = Collector(scores.shape[1], top, **how)
    for start in range(0, len(ids), batch):
        collector.add(ids[start : start + batch], scores[start : start + batch])
    return collector.result()


def full_sort(ids: np.ndarray, scores: np.ndarray, top: int) -> list[tuple[int, int, float]]:
    """Plain Python."""
    out = []
    for k in range(scores.shape[1]):
        ranked = sorted((-float(scores[i, k]), int(ids[i])) for i in range(len(ids)))
        out += [(k, i, -s) for s, i in ranked[:top]]
    return out


def rows(found: Candidates) -> list[tuple[int, int, float]]:
    return list(zip(found.class_C.tolist(), found.id_C.tolist(), found.score_C.tolist(), strict=True))


def same(a: Candidates, b: Candidates) -> bool:
    return rows(a) == rows(b)


@pytest.fixture(params=[4, 1 << 22], autouse=True)
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "HELD", request.param)  # 4: the best are chosen all the time


@settings(max_examples=60, deadline=None)
@given(scored(), st.integers(1, 9))
def test_streaming_is_a_full_sort(data: tuple[np.ndarray, np.ndarray, int, int], batch: int) -> None:
    ids, scores, top, seed = data
    expected = full_sort(ids, scores, top)
    assert rows(streamed(ids, scores, top, batch)) == expected
    order = np.random.default_rng(seed).permutation(len(ids))
    assert rows(streamed(ids[order], scores[order], top, 3)) == expected  # ties go by id, not by who came first
    third = len(ids) // 3
    parts = [streamed(ids[a:b], scores[a:b], top, 2) for a, b in ((0, third), (third, 2 * third), (2 * third, None))]
    assert rows(best(parts, top)) == expected
    assert same(best([best(parts[:2], top), parts[2]], top), best([parts[0], best(parts[1:], top)], top))


@settings(max_examples=60, deadline=None)
@given(scored(), st.integers(1, 6), st.integers(1, 8))
def test_the_assignment_is_a_capped_function(
    data: tuple[np.ndarray, np.ndarray, int, int], per_class: int, cut_rank: int
) -> None:
    ids, scores, top, seed = data
    classes = scores.shape[1]
    found = streamed(ids, scores, max(top, per_class), 5)
    made = assign(found, classes, per_class, cut_rank)
    chosen = rows(made.chosen)
    assert len({i for _, i, _ in chosen}) == len(chosen)  # each sample once
    assert set(chosen) <= set(rows(found))
    assert np.bincount(made.chosen.class_C, minlength=classes).max(initial=0) <= per_class
    assert sorted(made.order_K.tolist()) == list(range(classes))
    cuts = made.cut_K[made.order_K]
    assert (cuts[:-1] <= cuts[1:]).all()  # rarest first
    # Plain greedy over lists.
    taken: dict[int, int] = {}
    for k in made.order_K.tolist():
        mine = [i for c, i, _ in rows(found) if c == k and i not in taken][:per_class]
        taken |= dict.fromkeys(mine, k)
    assert {i: c for c, i, _ in chosen} == taken
    order = np.random.default_rng(seed).permutation(len(ids))
    again = assign(streamed(ids[order], scores[order], max(top, per_class), 2), classes, per_class, cut_rank)
    assert same(again.chosen, made.chosen)


def test_the_rarest_class_is_served_first() -> None:
    """Two samples suit both classes; class 1 has nothing else, class 0 has more. It gets them, whatever the number."""
    ids = np.arange(4)
    scores = np.array([[0.9, 0.5], [0.8, 0.4], [0.7, 0.0], [0.6, 0.0]], np.float32)
    made = assign(streamed(ids, scores, 4, 4), 2, per_class=2, cut_rank=2)
    assert made.order_K.tolist() == [1, 0]
    assert rows(made.chosen) == [
        (0, 2, pytest.approx(0.7)),
        (0, 3, pytest.approx(0.6)),
        (1, 0, 0.5),
        (1, 1, pytest.approx(0.4)),
    ]
    flipped = assign(streamed(ids, scores[:, ::-1].copy(), 4, 4), 2, per_class=2, cut_rank=2)
    assert flipped.order_K.tolist() == [0, 1]


def test_scores_of_one_are_the_best_and_stay_float() -> None:
    """What 8 bits turn into the worst."""
    ids, scores = np.arange(3), np.array([[0.3], [1.0], [0.99999]], np.float32)
    assert streamed(ids, scores, 2, 1).id_C.tolist() == [1, 2]
    assert streamed(ids, scores, 2, 1).score_C.dtype == np.float32


def test_a_sample_is_a_candidate_of_its_nearest_classes() -> None:
    ids = np.arange(3)
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.2, 0.1], [0.1, 0.5, 0.6]], np.float32)
    found = streamed(ids, scores, 9, 2, nearest=1)
    assert [(c, i) for c, i, _ in rows(found)] == [(0, 0), (0, 1), (1, 1), (2, 2)]  # a tie is a candidate of both
    assert same(streamed(ids, scores, 9, 2, nearest=7), streamed(ids, scores, 9, 2))
    assert [(c, i) for c, i, _ in rows(streamed(ids, scores, 9, 2, least=0.55))] == [(0, 0), (1, 0), (2, 2)]


def test_a_class_without_candidates_is_no_error() -> None:
    found = streamed(np.arange(2), np.array([[0.9, -0.5], [0.8, -0.5]], np.float32), 5, 1, least=0.0)
    made = assign(found, 2, per_class=5, cut_rank=1)
    assert made.order_K.tolist() == [1, 0] and made.cut_K.tolist()[1] == -np.inf
    assert made.chosen.class_C.tolist() == [0, 0]
    assert len(assign(Candidates.none(), 3, 1, 1).chosen.id_C) == 0
    assert same(Candidates.of(found.table()), found)
