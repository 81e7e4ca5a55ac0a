"""Zero-shot classification: images against an ensemble of prompts per class.

N images, K classes, P prompts of a class, Q query tokens, E shared embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import DataError
from isthmus.evaluation.intervals import rounded, wilson
from isthmus.evaluation.retrieval import pessimistic_ranks, similarity

TOPS = (1, 5)


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every class name, class by class."""
    return [template.replace("{}", name) for name in classes for template in templates]


def class_vectors(prompts_PE: Tensor, classes: int) -> Tensor:
    """Each prompt's vector normalised, averaged over its class, normalised again: float32 [K, E].

    Args:
        prompts_PE: K * P vectors, class by class.
        classes: K.

    Raises:
        DataError: vectors that are not finite, or a class whose prompts cancel out.
    """
    _finite("text", prompts_PE)
    unit_KPE = F.normalize(prompts_PE.float(), dim=-1).unflatten(0, (classes, -1))
    mean_KE = unit_KPE.mean(dim=1)
    if bool((mean_KE.norm(dim=-1) < 1e-6).any()):
        raise DataError("The prompts of a class have vectors that cancel out.", "The model is broken; retrain it.")
    return F.normalize(mean_KE, dim=-1)


def class_ranks(images_NQE: Tensor, classes_KE: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """(rank of each image's class from 1, the best class of each image), int64 [N] each.

    Similarity is the largest cosine over the image's query tokens. A wrong class of equal score ranks before the
    right one, and is then the best one too.

    Raises:
        DataError: vectors that are not finite.
    """
    _finite("image", images_NQE)
    scores_NK = similarity(F.normalize(images_NQE.float(), dim=-1), classes_KE)
    ranks = torch.stack(
        [pessimistic_ranks(s, label.unsqueeze(0))[0] for s, label in zip(scores_NK, label_N, strict=True)]
    )
    own = F.one_hot(label_N, classes_KE.shape[0]).bool()
    wrong = scores_NK.masked_fill(own, -torch.inf).argmax(dim=1)
    return ranks, torch.where(ranks == 1, label_N, wrong)


def classification_metrics(ranks_N: Tensor, label_N: Tensor, classes: int) -> dict[str, float]:
    """Top-1, top-5 and the mean over classes of the share of their images that are right, with chance values.

    A class without an image has no recall and stays out of the mean. With five classes or fewer there is no top-5.
    """
    out: dict[str, float] = {}
    for k in TOPS:
        if k < classes or k == 1:
            out[f"top_{k}"] = float((ranks_N <= k).double().mean())
            out[f"top_{k}_chance"] = min(1.0, k / classes)
    right = torch.bincount(label_N, weights=(ranks_N == 1).double(), minlength=classes)
    count = torch.bincount(label_N, minlength=classes)
    out["mean_per_class_recall"] = float((right[count > 0] / count[count > 0]).mean())
    return out


def classification_intervals(ranks_N: Tensor, classes: int) -> dict[str, list[float]]:
    """95 % intervals [low, high] of top-1 and top-5, ``top_1_ci95`` and so on."""
    tops = [k for k in TOPS if k < classes or k == 1]
    return {f"top_{k}_ci95": rounded(wilson(int((ranks_N <= k).sum()), len(ranks_N))) for k in tops}


def _finite(what: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise DataError(f"Some {what} embeddings are not finite numbers.", "The model is broken; retrain it.")
