"""Image-text matching with hard negatives drawn from the global batch (ITM: Li et al. 2021, section 3.2).

Shape letters: B local rows, G global rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.contracts import Comm, Reference
from isthmus.losses.counting import GlobalMean, uniform

PRIOR_ENTROPY = 0.6365141682948128  # of one positive in three: what predicting the prior costs


@dataclass(frozen=True)
class Negatives:
    """Chosen partners, as global row numbers (int64 [B]).

    Attributes:
        image_B: for each local text, an image that is not its own.
        text_B: for each local image, a text that is not its own.
        counted_B: bool; False where a row is padding or has no other to choose.
    """

    image_B: Tensor
    text_B: Tensor
    counted_B: Tensor


@torch.no_grad()
def negative_weights(logits_BG: Tensor, forbidden_BG: Tensor) -> Tensor:
    """Probability of each column as the row's negative: softmax of the logits over what is not forbidden.

    Rows without an allowed column are all zero.
    """
    return logits_BG.float().masked_fill(forbidden_BG, -torch.inf).softmax(1).nan_to_num(0.0)


def draw(weights_BG: Tensor, seed: int, step: int, first_row: int, direction: int) -> Tensor:
    """One column per row, by its weight: int64 [B].

    The random number of a row is a function of (seed, step, global row, direction) alone, so the draw is the same for
    any number of ranks. Columns of weight zero are never drawn (a row of zeros gives column 0).
    """
    rows = np.arange(first_row, first_row + len(weights_BG))
    u_B = torch.from_numpy(uniform(seed, step, rows, direction)).to(weights_BG.device)
    cumulative_BG = weights_BG.double().cumsum(1)
    total_B = cumulative_BG[:, -1]
    # Strictly below the total, so never past the last column that carries weight; `right` skips columns of no width.
    point_B1 = torch.minimum(u_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B))).unsqueeze(1)
    index_B = torch.searchsorted(cumulative_BG, point_B1, right=True).squeeze(1)
    return index_B.clamp(max=weights_BG.shape[1] - 1) * (total_B > 0)


@torch.no_grad()
def mine_negatives(
    i2t_BG: Tensor, t2i_BG: Tensor, forbidden_BG: Tensor, valid_B: Tensor, comm: Comm, *, seed: int, step: int
) -> Negatives:
    """A hard negative for each local text and each local image.

    Args:
        i2t_BG, t2i_BG: logits of local rows against global columns.
        forbidden_BG: bool; a row's own positives and padding columns.
        valid_B: bool; rows that are no padding.
        comm: tells this rank's place.
        seed, step: key the draw.
    """
    first = comm.rank * len(valid_B)
    image_B = draw(negative_weights(t2i_BG, forbidden_BG), seed, step, first, 0)
    text_B = draw(negative_weights(i2t_BG, forbidden_BG), seed, step, first, 1)
    return Negatives(image_B, text_B, valid_B & (~forbidden_BG).any(1))


@dataclass(frozen=True)
class Match:
    """The loss, and the share judged rightly of each kind of pair."""

    loss: Tensor
    accuracy: Mapping[str, Tensor]


def matching(logits_32B: Tensor, counted_B: Tensor, comm: Comm) -> Match:
    """Cross-entropy of 'these belong together', mean over three pairs a row.

    Args:
        logits_32B: [3, B, 2]: own pairs; negative image with own text; own image with negative text.
            Class 1 is a match.
        counted_B: rows that count.
        comm: the ranks' collectives.
    """
    labels_3B = torch.zeros(logits_32B.shape[:2], dtype=torch.long, device=logits_32B.device)
    labels_3B[0] = 1
    losses_3B = F.cross_entropy(logits_32B.float().flatten(0, 1), labels_3B.flatten(), reduction="none")
    mean = GlobalMean(counted_B, comm)
    loss = mean(losses_3B.view_as(labels_3B).mean(0))
    with torch.no_grad():
        right_3B = (logits_32B.argmax(-1) == labels_3B).float()
        names = ("positive", "negative_image", "negative_text")
        accuracy = {name: mean(right_B) for name, right_B in zip(names, right_3B, strict=True)}
    return Match(loss, accuracy)


def matching_reference() -> Reference:
    """The prior's entropy; no floor but zero."""
    return Reference(PRIOR_ENTROPY, 0.0)
