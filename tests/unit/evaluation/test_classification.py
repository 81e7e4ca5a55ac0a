"""Zero-shot classification: the ensemble's vectors, ties, per-class recall; against numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score, top_k_accuracy_score

from isthmus.config import ClassificationConfig
from isthmus.errors import DataError
from isthmus.evaluation.classification import class_ranks, class_vectors, classification_metrics, prompts


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_prompts_go_class_by_class() -> None:
    assert prompts(["cat", "dog"], ["a {}", "{}!"]) == ["a cat", "cat!", "a dog", "dog!"]


def test_class_vectors_normalise_average_normalise() -> None:
    vectors = randn(6, 5) * torch.tensor([1.0, 9.0, 1.0, 1.0, 0.1, 1.0]).unsqueeze(1)  # lengths must not weigh
    found = class_vectors(vectors, 2).numpy()
    unit = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    mean = unit.reshape(2, 3, 5).mean(axis=1)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_figures_equal_scikit_learn(queries: int) -> None:
    images, classes, count = randn(200, queries, 8), class_vectors(randn(9, 8, seed=1), 9), 9
    label = torch.randint(0, count, (200,), generator=torch.Generator().manual_seed(2))
    ranks, best = class_ranks(images, classes, label)
    unit = images / images.norm(dim=-1, keepdim=True)
    scores = torch.einsum("nqe,ke->nqk", unit, classes).amax(dim=1).numpy()
    metrics = classification_metrics(ranks, label, count)
    assert metrics["top_1"] == pytest.approx(top_k_accuracy_score(label, scores, k=1, labels=range(count)))
    assert metrics["top_5"] == pytest.approx(top_k_accuracy_score(label, scores, k=5, labels=range(count)))
    assert best.tolist() == scores.argmax(axis=1).tolist()
    wanted = recall_score(label, scores.argmax(axis=1), average="macro", labels=range(count))
    assert metrics["mean_per_class_recall"] == pytest.approx(wanted)
    assert metrics["top_5_chance"] == pytest.approx(5 / 9)


def test_mean_per_class_is_not_the_mean_over_images() -> None:
    label, ranks = torch.tensor([0, 0, 0, 0, 1, 3]), torch.tensor([1, 1, 1, 1, 2, 2])
    metrics = classification_metrics(ranks, label, 4)
    assert metrics["top_1"] == pytest.approx(4 / 6)
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)  # class 2 has no image and no recall
    assert "top_5" not in metrics


def test_a_model_that_says_the_same_of_every_class_is_never_right() -> None:
    images, classes = torch.ones(6, 1, 4), torch.ones(7, 4) / 2
    ranks, best = class_ranks(images, classes, torch.arange(6))
    assert classification_metrics(ranks, torch.arange(6), 7)["top_5"] == 0.0
    assert all(best != torch.arange(6))


def test_broken_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="text embeddings are not finite"):
        class_vectors(torch.full((4, 3), torch.nan), 2)
    with pytest.raises(DataError, match="cancel out"):
        class_vectors(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1)
    with pytest.raises(DataError, match="image embeddings are not finite"):
        class_ranks(torch.full((1, 1, 2), torch.inf), torch.eye(2), torch.tensor([0]))


def test_a_template_has_one_place() -> None:
    assert all(text.count("{}") == 1 for text in ClassificationConfig().templates)
    with pytest.raises(ValueError, match="exactly one"):
        ClassificationConfig(templates=("a photo",))
    with pytest.raises(ValueError, match="at least 1"):
        ClassificationConfig(templates=())
