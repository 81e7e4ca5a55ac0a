"""Image-text retrieval figures: ranks with pessimistic ties, recall at k, mean average precision.

N images, C captions, Q query tokens, E shared embedding, R rows of one chunk.

TR: each image looks for its captions. IR: each caption looks for its image. A rank counts every wrong candidate that
scores at least as high as the right one, so a model that scores everything alike has rank "last", not first (counting
only strictly higher scores would give it 100 %).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.evaluation.intervals import clustered, rounded, wilson

RECALLS = (1, 5, 10)
TIES = "pessimistic: a wrong candidate of equal score ranks before the right one"
CELLS = 1 << 24  # similarity values held at once
UNRANKED = -100.0  # score of a pair that the re-ranker did not look at, as in LAVIS's compute_sim_matrix

Score = Callable[[Sequence[int], Sequence[int]], Tensor]
"""(image rows, caption rows) of equal length -> one matching logit each, float32."""


@dataclass(frozen=True)
class Retrieval:
    """Ranks start at 1.

    Attributes:
        tr_rank: of each image's best caption, int64 [N].
        ir_rank: of each caption's image, int64 [C].
        tr_ap: average precision of each image over all its captions, float64 [N].
        top_captions: caption rows by falling score, int64 [N, <=10].
        top_images: image rows by falling score, int64 [C, <=10].
        owner: image row of each caption, int64 [C].
    """

    tr_rank: Tensor
    ir_rank: Tensor
    tr_ap: Tensor
    top_captions: Tensor
    top_images: Tensor
    owner: Tensor = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Recalls, their chance values, mean and median ranks, mAP. All recalls are fractions of 1."""
        images, captions = len(self.tr_rank), len(self.ir_rank)
        positives = torch.bincount(self.owner, minlength=images).tolist()
        out: dict[str, float] = {}
        for k in RECALLS:
            out[f"tr_at_{k}"] = _share(self.tr_rank <= k)
            out[f"ir_at_{k}"] = _share(self.ir_rank <= k)
            out[f"tr_at_{k}_chance"] = sum(_chance(captions, p, k) for p in positives) / images
            out[f"ir_at_{k}_chance"] = min(1.0, k / images)
        for way in ("tr", "ir"):
            out[f"{way}_mean"] = sum(out[f"{way}_at_{k}"] for k in RECALLS) / len(RECALLS)
            out[f"{way}_mean_rank"] = float(getattr(self, f"{way}_rank").double().mean())
            out[f"{way}_median_rank"] = float(getattr(self, f"{way}_rank").double().median())
        out["r_mean"] = (out["tr_mean"] + out["ir_mean"]) / 2
        out["tr_map"] = float(self.tr_ap.mean())
        out["ir_map"] = float((1.0 / self.ir_rank.double()).mean())  # one relevant image: AP is 1 / rank
        return out

    def intervals(self, seed: int = 0) -> dict[str, list[float]]:
        """95 % intervals [low, high] of the recalls, ``tr_at_1_ci95`` and so on (:mod:`isthmus.evaluation.intervals`).

        They say how far other images of the same kind may differ. The candidates are held fixed: among more of them
        every recall is lower.
        """
        images = len(self.tr_rank)
        out = {}
        for k in RECALLS:
            out[f"tr_at_{k}_ci95"] = rounded(wilson(int((self.tr_rank <= k).sum()), images))
            out[f"ir_at_{k}_ci95"] = rounded(clustered(self.ir_rank <= k, self.owner, images, seed))
        return out


def retrieve(
    images_NQE: Tensor, texts_CE: Tensor, owner_C: Tensor, *, score: Score | None = None, rerank: int = 0
) -> Retrieval:
    """Every image against every caption, similarity = largest cosine over the image's query tokens.

    Args:
        images_NQE: unit vectors, float32.
        texts_CE: unit vectors, float32.
        owner_C: int64 image row of each caption; every image owns at least one.
        score: joint matching of given pairs (ITM); needed by ``rerank``.
        rerank: the best ``rerank`` candidates of each row get cosine + matching logit, all others -100
            (LAVIS's rule); 0 is off.

    Raises:
        DataError: NaN or infinite scores, or an image without a caption.
    """
    _check(images_NQE, texts_CE, owner_C)
    images, captions = images_NQE.shape[0], texts_CE.shape[0]
    positives = _positives(owner_C, images)
    tr_rank, tr_ap, top_captions = [], [], []
    reranking = bool(rerank and score is not None)
    for rows, sims_RC in _image_rows(images_NQE, texts_CE):
        if reranking and score is not None:
            wrong_first_RC = _wrong_first(sims_RC, [positives[row] for row in rows.tolist()])
            sims_RC = _reranked(sims_RC, wrong_first_RC, rows, rerank, score)
        top_captions.append(sims_RC.topk(min(10, captions), dim=1).indices)
        for row, sims_C in zip(rows.tolist(), sims_RC, strict=True):
            ranks = pessimistic_ranks(sims_C, positives[row])
            # positives among themselves take their order; the k-th best of them has k right answers up to its rank
            tr_rank.append(int(ranks[0]))
            tr_ap.append(average_precision(ranks))
    ir_rank, top_images = [], []
    for rows, sims_RN in _caption_rows(images_NQE, texts_CE):
        own_R1 = owner_C[rows].unsqueeze(1)
        if reranking and score is not None:
            wrong_first_RN = _wrong_first(sims_RN, list(own_R1))
            sims_RN = _reranked(sims_RN, wrong_first_RN, rows, rerank, lambda queries, found: score(found, queries))
        top_images.append(sims_RN.topk(min(10, images), dim=1).indices)
        ir_rank.append((sims_RN >= sims_RN.gather(1, own_R1)).sum(dim=1))  # counts itself: ranks start at 1
    return Retrieval(
        tr_rank=torch.tensor(tr_rank),
        ir_rank=torch.cat(ir_rank),
        tr_ap=torch.tensor(tr_ap, dtype=torch.float64),
        top_captions=torch.cat(top_captions),
        top_images=torch.cat(top_images),
        owner=owner_C,
    )


def pessimistic_ranks(scores_C: Tensor, positives: Tensor) -> Tensor:
    """Ranks of the right answers, ascending, int64 [P]: 1 + wrong ones at least as high + right ones before it.

    Args:
        scores_C: one query's scores.
        positives: indices of its right answers.
    """
    right = scores_C[positives].sort(descending=True).values
    wrong = torch.ones_like(scores_C, dtype=torch.bool)
    wrong[positives] = False
    ahead = (scores_C[wrong].unsqueeze(0) >= right.unsqueeze(1)).sum(dim=1)
    return ahead + torch.arange(1, len(right) + 1)


def average_precision(ranks: Tensor) -> float:
    """Mean over the right answers of the precision at their ranks (ascending, from 1)."""
    return float((torch.arange(1, len(ranks) + 1, dtype=torch.float64) / ranks).mean())


def similarity(images_NQE: Tensor, texts_CE: Tensor) -> Tensor:
    """[N, C]: one product per query token, so that the [N, C, Q] cube never exists."""
    best = images_NQE[:, 0] @ texts_CE.T
    for query in range(1, images_NQE.shape[1]):
        torch.maximum(best, images_NQE[:, query] @ texts_CE.T, out=best)
    return best


def candidates(images_NQE: Tensor, texts_CE: Tensor, owner_C: Tensor, k: int) -> np.ndarray:
    """The pairs that :func:`retrieve` will score, both ways, each once: sorted int64 image * C + caption."""
    _check(images_NQE, texts_CE, owner_C)
    captions = texts_CE.shape[0]
    positives = _positives(owner_C, images_NQE.shape[0])
    keys = []
    for rows, sims_RC in _image_rows(images_NQE, texts_CE):
        best = _best(_wrong_first(sims_RC, [positives[row] for row in rows.tolist()]), k)
        keys.append((rows.unsqueeze(1) * captions + best).flatten())
    for rows, sims_RN in _caption_rows(images_NQE, texts_CE):
        best = _best(_wrong_first(sims_RN, list(owner_C[rows].unsqueeze(1))), k)
        keys.append((best * captions + rows.unsqueeze(1)).flatten())
    return np.unique(torch.cat(keys).numpy())


def look_up(keys: np.ndarray, logits: np.ndarray, captions: int) -> Score:
    """A ``score`` that reads logits made before.

    Args:
        keys: sorted pairs as :func:`candidates` gives them. logits: float32, one each.
        captions: C.
    """

    def score(image_rows: Sequence[int], caption_rows: Sequence[int]) -> Tensor:
        asked = np.asarray(image_rows, np.int64) * captions + np.asarray(caption_rows, np.int64)
        places = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
        if not np.array_equal(keys[places], asked):
            raise DataError("Some pairs were not scored by the matching head.", "This is a fault; report it.")
        return torch.from_numpy(logits[places])

    return score


def hardest_wrong(images_NQE: Tensor, texts_CE: Tensor, forbidden: Sequence[Tensor]) -> list[int | None]:
    """Each image's most similar caption among those that are wrong for it; None where none is wrong.

    Args:
        forbidden: caption rows of each image that are not wrong.

    Raises:
        DataError: NaN or infinite embeddings.
    """
    _finite(images_NQE, texts_CE)
    out: list[int | None] = []
    for rows, sims_RC in _image_rows(images_NQE, texts_CE):
        for row, sims_C in zip(rows.tolist(), sims_RC, strict=True):
            sims_C[forbidden[row]] = -torch.inf
            best = int(sims_C.argmax())
            out.append(best if torch.isfinite(sims_C[best]) else None)
    return out


def _image_rows(images_NQE: Tensor, texts_CE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their similarities [R, C]) of all images, a chunk at a time."""
    for rows in _chunks(images_NQE.shape[0], texts_CE.shape[0] * images_NQE.shape[1]):
        yield rows, similarity(images_NQE[rows], texts_CE)


def _caption_rows(images_NQE: Tensor, texts_CE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their similarities [R, N]) of all captions, a chunk at a time."""
    for rows in _chunks(texts_CE.shape[0], images_NQE.shape[0] * images_NQE.shape[1]):
        yield rows, similarity(images_NQE, texts_CE[rows]).T


def _wrong_first(sims_RC: Tensor, positives: Sequence[Tensor]) -> Tensor:
    """float64 [R, C]: right answers lowered by less than any two float32 numbers differ, so that a tie at the k-th
    place is the wrong candidate's. Among equals, which of them reaches the re-ranker is otherwise luck."""
    out = sims_RC.double()
    for row, right in zip(out, positives, strict=True):
        row[right] = torch.nextafter(row[right], row.new_tensor(-torch.inf))
    return out


def _best(wrong_first_RC: Tensor, k: int) -> Tensor:
    return wrong_first_RC.topk(min(k, wrong_first_RC.shape[1]), dim=1).indices


def _reranked(sims_RC: Tensor, wrong_first_RC: Tensor, rows: Tensor, k: int, score: Score) -> Tensor:
    best = _best(wrong_first_RC, k)
    queries = rows.repeat_interleave(best.shape[1]).tolist()
    logits = score(queries, best.flatten().tolist()).reshape(best.shape).to(sims_RC)
    if not torch.isfinite(logits).all():
        raise DataError(
            "The matching head gave scores that are not finite numbers.", "The model is broken; retrain it."
        )
    return torch.full_like(sims_RC, UNRANKED).scatter(1, best, sims_RC.gather(1, best) + logits)


def _finite(images_NQE: Tensor, texts_CE: Tensor) -> None:
    for what, tensor in (("image", images_NQE), ("text", texts_CE)):
        if not torch.isfinite(tensor).all():
            raise DataError(f"Some {what} embeddings are not finite numbers.", "The model is broken; retrain it.")


def _check(images_NQE: Tensor, texts_CE: Tensor, owner_C: Tensor) -> None:
    _finite(images_NQE, texts_CE)
    if texts_CE.shape[0] != owner_C.shape[0]:
        raise DataError(f"There are {texts_CE.shape[0]} captions and {owner_C.shape[0]} owners.")
    missing = set(range(images_NQE.shape[0])) - set(owner_C.tolist())
    if missing or int(owner_C.max()) >= images_NQE.shape[0]:
        raise DataError(f"{len(missing)} images have no caption.", "Retrieval needs a caption for every image.")


def _positives(owner_C: Tensor, images: int) -> list[Tensor]:
    order = owner_C.argsort(stable=True)
    return list(order.split(torch.bincount(owner_C, minlength=images).tolist()))


def _chunks(rows: int, width: int) -> list[Tensor]:
    return list(torch.arange(rows).split(max(1, CELLS // max(1, width))))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _chance(candidates: int, right: int, k: int) -> float:
    """Probability that k random picks hold at least one of ``right`` right answers."""
    if candidates - right < k:
        return 1.0
    return (comb(candidates, k) - comb(candidates - right, k)) / comb(candidates, k)
