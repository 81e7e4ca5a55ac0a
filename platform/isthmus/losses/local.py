"""Local alignment: image tokens against words over the global batch (FILIP, Yao et al. 2022), and pairs judged singly.

Shape letters: B local rows, G global rows, K image tokens, T text tokens, E shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isthmus.contracts import Comm, Reference
from isthmus.losses.contrastive import Contrast, contrast_of
from isthmus.losses.counting import GlobalMean
from isthmus.losses.matching import PRIOR_ENTROPY, Match

CHUNK = 1 << 22
"""Token similarities that are held at once."""


def tokens_to_words(image_BKE: Tensor, text_GTE: Tensor, words_GT: Tensor) -> Tensor:
    """Mean over an image's tokens of the similarity to the best word, float32 [B, G]; 0 for a text without words."""
    sims = torch.einsum("bke,gte->bgkt", image_BKE, text_GTE)
    best_BGK = sims.float().masked_fill(~words_GT[None, :, None, :], -torch.inf).amax(3)
    return best_BGK.masked_fill(~words_GT.any(1)[None, :, None], 0.0).mean(2)


def words_to_tokens(text_BTE: Tensor, words_BT: Tensor, image_GKE: Tensor) -> Tensor:
    """Mean over a text's words of the similarity to the best image token, float32 [B, G]; 0 without words."""
    best_BGT = torch.einsum("bte,gke->bgtk", text_BTE, image_GKE).amax(3).float()
    words_B1T = words_BT.unsqueeze(1)
    return (best_BGT * words_B1T).sum(2) / words_B1T.sum(2).clamp(min=1)


def local_contrast(
    image_BKE: Tensor,
    text_BTE: Tensor,
    words_BT: Tensor,
    temperature: Tensor,
    valid_B: Tensor,
    comm: Comm,
    *,
    full_gradient: bool = False,
    image_ids_B: Tensor | None = None,
    chunk: int | None = None,
) -> Contrast:
    """Cross-entropy both ways over the global batch, the two similarities being each side's own.

    Args:
        image_BKE, text_BTE: unit vectors of tokens; K and T are the same on all ranks.
        words_BT: bool; padding and special tokens are no words.
        temperature: [1].
        valid_B: bool; padding rows count neither as rows nor as columns.
        comm: the ranks' collectives.
        full_gradient, image_ids_B: as in :func:`isthmus.losses.contrastive.contrast`.
        chunk: token similarities that are made at once; the backward pass makes them anew. The result is the same.
    """
    images_GKE, texts_GTE = (comm.gather(x, grad=full_gradient) for x in (image_BKE, text_BTE))
    words_GT = comm.gather(words_BT, grad=False)
    cells = images_GKE.shape[1] * words_GT.shape[1] * len(words_GT)
    rows = max(1, (CHUNK if chunk is None else chunk) // max(1, cells))
    i2t_BG = _in_chunks(lambda part: tokens_to_words(part, texts_GTE, words_GT), rows, image_BKE)
    t2i_BG = _in_chunks(lambda part, words: words_to_tokens(part, words, images_GKE), rows, text_BTE, words_BT)
    return contrast_of(i2t_BG / temperature, t2i_BG / temperature, valid_B, comm, image_ids_B=image_ids_B)


def _in_chunks(function: Callable[..., Tensor], rows: int, *given: Tensor) -> Tensor:
    parts = zip(*(x.split(rows) for x in given), strict=True)
    if rows >= len(given[0]) or not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def pair_similarity(image_BKE: Tensor, text_BTE: Tensor, words_BT: Tensor) -> Tensor:
    """Mean of both directions' similarity of each image with its own text, float32 [B]."""
    sims_BKT = (image_BKE @ text_BTE.transpose(1, 2)).float()
    words_B1T = words_BT.unsqueeze(1)
    best_BK = sims_BKT.masked_fill(~words_B1T, -torch.inf).amax(2).masked_fill(~words_BT.any(1, keepdim=True), 0.0)
    to_tokens_B = (sims_BKT.amax(1) * words_BT).sum(1) / words_BT.sum(1).clamp(min=1)
    return (best_BK.mean(1) + to_tokens_B) / 2


def relation(logits_3B: Tensor, counted_B: Tensor, comm: Comm) -> Match:
    """Binary cross-entropy of 'these belong together', mean over a row's three pairs.

    Args:
        logits_3B: own pairs; negative image with own text; own image with negative text.
        counted_B: rows that count.
        comm: the ranks' collectives.
    """
    labels_3B = torch.zeros_like(logits_3B)
    labels_3B[0] = 1.0
    mean = GlobalMean(counted_B, comm)
    loss = mean(F.binary_cross_entropy_with_logits(logits_3B, labels_3B, reduction="none").mean(0))
    with torch.no_grad():
        right_3B = ((logits_3B > 0) == (labels_3B > 0)).float()
        accuracy: Mapping[str, Tensor] = {"positive": mean(right_3B[0]), "negative": mean(right_3B[1:].mean(0))}
    return Match(loss, accuracy)


def relation_reference() -> Reference:
    """The prior's entropy: one pair of three is right."""
    return Reference(PRIOR_ENTROPY, 0.0)
