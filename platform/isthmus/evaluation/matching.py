"""Image-text matching as a classifier: right captions against wrong ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isthmus.errors import DataError


def auc(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> float:
    """Probability that a right pair scores above a wrong one; a tie counts one half. Exact, in float64.

    Raises:
        DataError: no pair of one kind, or scores that are not finite.
    """
    right, wrong = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    if not len(right) or not len(wrong):
        raise DataError("AUC needs right pairs and wrong ones.", "Evaluate more images.")
    if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
        raise DataError(
            "The matching head gave scores that are not finite numbers.", "The model is broken; retrain it."
        )
    wrong = np.sort(wrong)
    below = np.searchsorted(wrong, right, side="left")
    level = np.searchsorted(wrong, right, side="right") - below
    return float((below + 0.5 * level).sum() / (len(right) * len(wrong)))


def matching_metrics(positives: Sequence[float], negatives: Sequence[Sequence[float]]) -> dict[str, float]:
    """Figures of log-odds; above 0 is a yes, and 0 itself is wrong for either kind of pair.

    Args:
        positives: one per image.
        negatives: those of each image, at least one.
    """
    flat = [score for some in negatives for score in some]
    right, wrong = np.asarray(positives), np.asarray(flat)
    pairs = [float(mine > max(some)) for mine, some in zip(positives, negatives, strict=True)]
    hits = int((right > 0).sum() + (wrong < 0).sum())
    return {
        "itm_auc": auc(right, wrong),
        "itm_accuracy": hits / (len(right) + len(wrong)),
        "itm_accuracy_positive": float((right > 0).mean()),
        "itm_accuracy_negative": float((wrong < 0).mean()),
        "itm_accuracy_chance": max(len(right), len(wrong)) / (len(right) + len(wrong)),
        "itm_first": sum(pairs) / len(pairs),  # the right caption above all of the image's wrong ones
    }
