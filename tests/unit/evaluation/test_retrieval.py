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


def test_average_precision_equals_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(0)
    for _ in range(200):
        size = int(generator.integers(2, 30))
        scores, relevant = generator.permutation(size).astype(np.float32), generator.random(size) < 0.3
        relevant[int(generator.integers(size))] = True
        ranks = pessimistic_ranks(torch.from_numpy(scores), torch.from_numpy(relevant.nonzero()[0]))
        assert average_precision(ranks) == pytest.approx(average_precision_score(relevant, scores), abs=1e-12)


def test_means_over_recalls() -> None:
    metrics = retrieve(unit(40, 1, 4), unit(40, 4, seed=1), torch.arange(40)).metrics()
    for way in ("tr", "ir"):
        assert metrics[f"{way}_mean"] == pytest.approx(np.mean([metrics[f"{way}_at_{k}"] for k in (1, 5, 10)]))
    assert 0 < metrics["r_mean"] == pytest.approx((metrics["tr_mean"] + metrics["ir_mean"]) / 2)


def test_scores_made_before_rerank_as_scores_made_on_demand() -> None:
    images, owner = unit(17, 2, 6), torch.tensor([i for i in range(17) for _ in range(1 + i % 3)])
    texts = unit(len(owner), 6, seed=3)
    table = torch.randn(17, len(owner), generator=torch.Generator().manual_seed(5))

    def direct(image_rows: list[int], caption_rows: list[int]) -> torch.Tensor:
        return table[list(image_rows), list(caption_rows)]

    keys = retrieval.candidates(images, texts, owner, 4)
    assert len(set(keys.tolist())) == len(keys) < 17 * len(owner)
    logits = table.flatten()[torch.from_numpy(keys)].numpy()
    one = retrieve(images, texts, owner, score=direct, rerank=4)
    two = retrieve(images, texts, owner, score=retrieval.look_up(keys, logits, len(owner)), rerank=4)
    assert one.tr_rank.tolist() == two.tr_rank.tolist() and one.ir_rank.tolist() == two.ir_rank.tolist()
    with pytest.raises(DataError, match="not scored"):
        short = retrieval.look_up(keys[1:], logits[1:], len(owner))
        retrieve(images, texts, owner, score=short, rerank=4)


def test_reranked_scores_are_cosine_plus_logit_of_the_best_and_minus_a_hundred_elsewhere() -> None:
    """LAVIS's rule, written out pair by pair."""
    count, k = 12, 5
    images, texts = unit(count, 3, 6), unit(count, 6, seed=3)
    table = 0.3 * torch.randn(count, count, generator=torch.Generator().manual_seed(5))
    found = retrieve(images, texts, torch.arange(count), score=lambda i, c: table[list(i), list(c)], rerank=k)
    sims = torch.einsum("nqe,ce->nqc", images, texts).amax(dim=1)
    for ranks, both in ((found.tr_rank, (sims, table)), (found.ir_rank, (sims.T, table.T))):
        full = torch.full((count, count), -100.0)
        for row in range(count):
            best = both[0][row].argsort(descending=True)[:k]
            full[row, best] = both[0][row, best] + both[1][row, best]
        own = full.diagonal()
        assert ranks.tolist() == [1 + int((full[i] >= own[i]).sum()) - 1 for i in range(count)]
    assert found.tr_rank.tolist() != retrieve(images, texts, torch.arange(count)).tr_rank.tolist()


def test_a_constant_first_stage_lets_no_right_answer_reach_the_reranker() -> None:
    """Among equals the k that are re-ranked are the wrong ones; by luck of their order an oracle would shine."""
    same = torch.ones(20, 1, 4) / 2
    oracle = lambda i, c: torch.tensor([10.0 * (a == b) for a, b in zip(i, c, strict=True)])  # noqa: E731
    metrics = retrieve(same, torch.ones(20, 4) / 2, torch.arange(20), score=oracle, rerank=5).metrics()
    assert metrics["tr_at_10"] == metrics["ir_at_10"] == 0.0


def test_the_hardest_wrong_caption() -> None:
    images, texts = unit(9, 2, 5), unit(14, 5, seed=1)
    forbidden = [torch.tensor([i, i + 1]) for i in range(9)]
    sims = torch.einsum("nqe,ce->nqc", images, texts).amax(dim=1).numpy()
    for row, found in enumerate(retrieval.hardest_wrong(images, texts, forbidden)):
        allowed = [c for c in range(14) if c not in (row, row + 1)]
        assert found == max(allowed, key=lambda c: sims[row, c])
    assert retrieval.hardest_wrong(images[:1], texts, [torch.arange(14)]) == [None]
