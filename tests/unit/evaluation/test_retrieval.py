"""Ranks, ties, chance, re-ranking: against brute force and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isthmus.errors import DataError
from isthmus.evaluation import retrieval
from isthmus.evaluation.retrieval import average_precision, pessimistic_ranks, retrieve


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def brute_ranks(sims: np.ndarray, owner: np.ndarray) -> tuple[list[int], list[int]]:
    images, captions = sims.shape
    tr = [
        1 + sum(sims[i, c] >= max(sims[i, owner == i]) for c in range(captions) if owner[c] != i) for i in range(images)
    ]
    ir = [1 + sum(sims[i, c] >= sims[owner[c], c] for i in range(images) if i != owner[c]) for c in range(captions)]
    return tr, ir


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("cells", [1 << 24, 50])
def test_ranks_equal_brute_force(queries: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CELLS", cells)  # 50: a chunk is a row or two
    images, owner = unit(13, queries, 8), torch.tensor([i for i in range(13) for _ in range(1 + i % 3)])
    texts = unit(len(owner), 8, seed=1)
    found = retrieve(images, texts, owner)
    sims = torch.einsum("nqe,ce->nqc", images, texts).max(dim=1).values.numpy()
    tr, ir = brute_ranks(sims, owner.numpy())
    assert found.tr_rank.tolist() == tr
    assert found.ir_rank.tolist() == ir
    assert found.top_captions[0].tolist() == np.argsort(-sims[0])[:10].tolist()


def test_a_model_that_says_the_same_of_everything_recalls_nothing() -> None:
    same = torch.ones(20, 1, 4) / 2
    metrics = retrieve(same, torch.ones(20, 4) / 2, torch.arange(20)).metrics()
    assert metrics["tr_at_1"] == metrics["ir_at_10"] == 0.0
    assert metrics["tr_mean_rank"] == metrics["ir_mean_rank"] == 20


def test_a_perfect_model_recalls_all() -> None:
    eye = torch.eye(12)
    metrics = retrieve(eye.unsqueeze(1), eye, torch.arange(12)).metrics()
    assert {metrics[f"{way}_at_1"] for way in ("tr", "ir")} == {1.0}
    assert metrics["tr_map"] == metrics["ir_map"] == metrics["r_mean"] == 1.0


def test_chance_is_what_random_embeddings_reach() -> None:
    runs = []
    for seed in range(40):
        owner = torch.tensor([i for i in range(30) for _ in range(2)])
        runs.append(retrieve(unit(30, 1, 16, seed=seed), unit(60, 16, seed=1000 + seed), owner).metrics())
    for name in ("tr_at_1", "tr_at_10", "ir_at_5"):
        measured, chance = np.mean([run[name] for run in runs]), runs[0][f"{name}_chance"]
        assert measured == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / (40 * 30)))


@pytest.mark.parametrize(("relevant", "expected"), [([1, 0, 1, 0, 0], 5 / 6), ([0, 0, 0, 1, 0], 0.25)])
def test_average_precision_known_answers(relevant: list[int], expected: float) -> None:
    scores = torch.arange(5, 0, -1).float()
    ranks = pessimistic_ranks(scores, torch.tensor(relevant).nonzero().flatten())
    assert average_precision(ranks) == pytest.approx(expected)


def test_not_a_number_is_refused() -> None:
    broken = unit(5, 1, 4)
    broken[2, 0, 1] = float("nan")
    with pytest.raises(DataError, match="finite"):
        retrieve(broken, unit(5, 4), torch.arange(5))
    with pytest.raises(DataError, match="finite"):
        retrieve(unit(5, 1, 4), unit(5, 4) * float("inf"), torch.arange(5))


def test_an_image_without_caption_is_refused() -> None:
    with pytest.raises(DataError, match="1 images have no caption"):
        retrieve(unit(3, 1, 4), unit(2, 4), torch.tensor([0, 2]))


def test_reranking_decides_among_the_best_and_only_there() -> None:
    count, k = 16, 4
    images, texts = unit(count, 1, 6), unit(count, 6, seed=3)
    asked: list[tuple[int, int]] = []

    def oracle(image_rows: list[int], caption_rows: list[int]) -> torch.Tensor:
        asked.extend(zip(image_rows, caption_rows, strict=True))
        return torch.tensor([10.0 if i == c else 0.0 for i, c in asked[-len(image_rows) :]])

    found = retrieve(images, texts, torch.arange(count), score=oracle, rerank=k)
    plain = retrieve(images, texts, torch.arange(count))
    assert len(asked) == 2 * count * k
    for before, after in zip(
        torch.cat([plain.tr_rank, plain.ir_rank]).tolist(),
        torch.cat([found.tr_rank, found.ir_rank]).tolist(),
        strict=True,
    ):
        # inside the best k the oracle puts the right one first; outside, all unseen pairs tie at -100
        assert after == (1 if before <= k else count)
    assert {1, count} == set(found.tr_rank.tolist())


def test_a_broken_matching_head_is_refused() -> None:
    with pytest.raises(DataError, match="matching head"):
        retrieve(
            unit(4, 1, 4), unit(4, 4), torch.arange(4), rerank=2, score=lambda i, c: torch.full((len(i),), torch.nan)
        )
