"""Does this sound belong to what is seen? "Matching accuracy" can mean two things, and both are measured, by name.

AVC, audio-visual correspondence as a binary question (Arandjelovic and Zisserman 2017): each clip is judged with its
own sound, and with one fixed other clip's. Chance is 50 %, whatever the number of clips. 1-of-N: each clip looks for
its own sound among those of all N, and each sound for its clip; chance is 1 / N. How the wrong partner and the
threshold are chosen is not written down anywhere for both; here it is by rule, see :func:`deranged` and :func:`avc`.

N clips (or images) with a sound each, Q vectors of a clip, E shared embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.evaluation.matching import auc

LEAST = 8
"""Pairs; with fewer, neither part would say anything."""


@dataclass(frozen=True)
class Avc:
    """The binary question.

    Attributes:
        accuracy: share of the test part's pairs, right and wrong ones, that the threshold tells.
        auc: probability that a right pair of the test part scores above a wrong one.
        threshold: chosen on the validation part; a pair at or above it is taken for a right one.
        validation, test: clips of each part; each gives a right pair and a wrong one.
        partner_N: row whose sound each clip is wrongly paired with.
        tested_N: bool, whether the clip is of the test part.
    """

    accuracy: float
    auc: float
    threshold: float
    validation: int
    test: int
    partner_N: np.ndarray
    tested_N: np.ndarray


def avc(scores_NN: Tensor, ids: Sequence[int], validation: float, seed: int) -> Avc:
    """Accuracy of 'does this sound belong to this clip?' at a threshold that the tested clips had no part in.

    Args:
        scores_NN: of clips (rows) with sounds (columns).
        ids: of the samples; with ``seed`` they decide parts and partners, in whatever order the samples come.
        validation: share of the clips on which the threshold is chosen.

    Raises:
        DataError: too few pairs.
    """
    if len(ids) < LEAST:
        raise DataError(f"{len(ids)} pairs are too few to tell right ones from wrong ones.", f"Give {LEAST} or more.")
    order_N = np.array(sorted(range(len(ids)), key=lambda row: _drawn(seed, ids[row])))
    count = min(max(2, round(validation * len(ids))), len(ids) - 2)
    partner_N = np.empty(len(ids), np.int64)
    for part in (order_N[:count], order_N[count:]):
        partner_N[part] = deranged(part)
    tested_N = np.zeros(len(ids), bool)
    tested_N[order_N[count:]] = True
    scores = scores_NN.double().numpy()
    right_N, wrong_N = scores.diagonal(), scores[np.arange(len(ids)), partner_N]
    threshold = best_threshold(right_N[~tested_N], wrong_N[~tested_N])
    hits = (right_N[tested_N] >= threshold).sum() + (wrong_N[tested_N] < threshold).sum()
    tests = len(ids) - count
    return Avc(
        accuracy=float(hits / (2 * tests)),
        auc=auc(right_N[tested_N], wrong_N[tested_N]),
        threshold=threshold,
        validation=count,
        test=tests,
        partner_N=partner_N,
        tested_N=tested_N,
    )


def deranged(rows: np.ndarray) -> np.ndarray:
    """A wrong partner for each of two or more rows, each once and none its own: the next one in their order."""
    return np.roll(rows, -1)


def best_threshold(right: np.ndarray, wrong: np.ndarray) -> float:
    """Of all thresholds the one that tells most pairs, in the middle between two scores; the lowest of equal ones."""
    values = np.unique(np.concatenate([right, wrong]))
    places = np.concatenate([[values[0]], (values[:-1] + values[1:]) / 2, [np.nextafter(values[-1], np.inf)]])
    above = len(right) - np.searchsorted(np.sort(right), places, side="left")
    below = np.searchsorted(np.sort(wrong), places, side="left")
    return float(places[(above + below).argmax()])


def similarities(seen_NQE: Tensor, heard_NE: Tensor) -> Tensor:
    """float32 [N, N], the largest cosine over a clip's vectors.

    Raises:
        DataError: vectors that are not finite.
    """
    if not (torch.isfinite(seen_NQE).all() and torch.isfinite(heard_NE).all()):
        raise DataError("Some embeddings are not finite numbers.", "The model is broken; retrain it.")
    return torch.einsum("nqe,me->nmq", seen_NQE, heard_NE).amax(2)


def _drawn(seed: int, sample_id: int) -> bytes:
    return hashlib.blake2b(f"correspondence/{seed}/{sample_id}".encode(), digest_size=8).digest()
