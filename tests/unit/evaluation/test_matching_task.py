"""ITM figures: AUC against scikit-learn, ties, and what counts as a right decision."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from isthmus.errors import DataError
from isthmus.evaluation.matching import auc, matching_metrics


@pytest.mark.parametrize("levels", [3, 1000])  # with three levels most pairs tie
def test_auc_equals_scikit_learn(levels: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        right = generator.integers(0, levels, generator.integers(1, 30)) + generator.integers(0, 2)
        wrong = generator.integers(0, levels, generator.integers(1, 50))
        labels = [1] * len(right) + [0] * len(wrong)
        assert auc(right, wrong) == pytest.approx(roc_auc_score(labels, [*right, *wrong]), abs=1e-12)


def test_constant_scores_are_worth_one_half() -> None:
    assert auc([0.3] * 5, [0.3] * 7) == 0.5
    assert auc([2.0], [1.0]) == 1.0 and auc([1.0], [2.0]) == 0.0


def test_close_scores_are_told_apart_in_float64() -> None:
    assert auc([1.0 + 1e-12], [1.0]) == 1.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_scores_are_refused(broken: float) -> None:
    with pytest.raises(DataError, match="finite"):
        auc([1.0, broken], [0.0])
    with pytest.raises(DataError, match="finite"):
        auc([1.0], [0.0, broken])


def test_auc_needs_both_kinds() -> None:
    with pytest.raises(DataError, match="right pairs and wrong ones"):
        auc([], [1.0])


def test_decisions_are_pessimistic() -> None:
    metrics = matching_metrics([2.0, 0.0, 1.0], [[1.0, -1.0], [-2.0], [1.0]])
    assert metrics["itm_accuracy_positive"] == pytest.approx(2 / 3)  # 0 is no yes
    assert metrics["itm_accuracy_negative"] == pytest.approx(2 / 4)
    assert metrics["itm_accuracy"] == pytest.approx(4 / 7)
    assert metrics["itm_accuracy_chance"] == pytest.approx(4 / 7)
    assert metrics["itm_first"] == pytest.approx(2 / 3)  # the third ties with its negative
    assert metrics["itm_auc"] == pytest.approx(roc_auc_score([1, 1, 1, 0, 0, 0, 0], [2, 0, 1, 1, -1, -2, 1]))
    assert matching_metrics([0.0] * 4, [[0.0]] * 4)["itm_accuracy"] == 0.0
