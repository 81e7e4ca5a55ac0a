"""Image-text contrast over the global batch (ITC: Li et al. 2023, section 3.1; the projector's InfoNCE is its Q = 1).

Shape letters: B local rows, G global rows (B x world size), Q vectors per image, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.contracts import Comm, LocalComm, Reference
from isthmus.losses.counting import GlobalMean


@dataclass(frozen=True)
class Contrast:
    """The loss and what hard-negative mining and logging reuse.

    Attributes:
        loss: scalar, scaled as :class:`isthmus.contracts.LossTerms` asks.
        i2t_BG, t2i_BG: logits (similarity / temperature) of local rows against global columns.
        positives_BG: bool, the columns that belong to each row.
        valid_G: bool, columns that are no padding.
        mean: over the valid rows of all ranks.
    """

    loss: Tensor
    i2t_BG: Tensor
    t2i_BG: Tensor
    positives_BG: Tensor
    valid_G: Tensor
    mean: GlobalMean

    @torch.no_grad()
    def recall_at_1(self, logits_BG: Tensor) -> Tensor:
        """Share of rows whose positive is the one best column; a tie is a miss, so constant scores give zero."""
        best_other_B = logits_BG.masked_fill(self.positives_BG | ~self.valid_G, -torch.inf).amax(1)
        best_own_B = logits_BG.masked_fill(~self.positives_BG, -torch.inf).amax(1)
        return self.mean((best_own_B > best_other_B).float())

    def to_mine(self) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`isthmus.losses.matching.mine_negatives` reads: both logits without gradient, and bool [B, G], the
        columns that are no row's negative."""
        return self.i2t_BG.detach(), self.t2i_BG.detach(), self.positives_BG | ~self.valid_G


def best_query(images_BQE: Tensor, texts_GE: Tensor) -> Tensor:
    """Similarity [B, G]: the largest over an image's vectors."""
    if images_BQE.shape[1] == 1:
        return images_BQE[:, 0] @ texts_GE.T
    B, Q, E = images_BQE.shape
    return (images_BQE.reshape(B * Q, E) @ texts_GE.T).view(B, Q, -1).amax(1)


def best_query_of_columns(texts_BE: Tensor, images_GQE: Tensor) -> Tensor:
    """Similarity [B, G] of local texts to global images: the largest over each image's vectors."""
    G, Q, E = images_GQE.shape
    sims = texts_BE @ images_GQE.reshape(G * Q, E).T
    return sims if Q == 1 else sims.view(-1, G, Q).amax(2)


def contrast(
    images_BQE: Tensor,
    texts_BE: Tensor,
    temperature: Tensor,
    valid_B: Tensor,
    comm: Comm,
    *,
    smoothing: float = 0.0,
    full_gradient: bool = False,
    image_ids_B: Tensor | None = None,
    own_rows: bool = False,
    symmetric: bool = True,
) -> Contrast:
    """Cross-entropy both ways over the global batch, averaged.

    Args:
        images_BQE, texts_BE: unit vectors of the local rows.
        temperature: [1], divides the similarities.
        valid_B: bool; padding rows count neither as rows nor as columns.
        comm: the ranks' collectives.
        smoothing: share of each target spread evenly over all valid columns.
        full_gradient: False gathers the other side without gradient, this rank's rows included, as LAVIS does; True
            gives the gradient of the loss of the global batch on one process.
        image_ids_B: int64; given, all columns of a row's image are its positives in equal parts. Without them only its
            own column is.
        own_rows: this rank's rows are contrasted with one another alone, and G is B. The mean over rows stays that of
            all ranks; the loss depends on their number.
        symmetric: False takes the loss of images looking for their texts alone.
    """
    near = LocalComm() if own_rows else comm
    images_GQE = near.gather(images_BQE, grad=full_gradient)
    texts_GE = near.gather(texts_BE, grad=full_gradient)
    i2t_BG = best_query(images_BQE, texts_GE) / temperature
    t2i_BG = best_query_of_columns(texts_BE, images_GQE) / temperature
    return contrast_of(
        i2t_BG, t2i_BG, valid_B, comm,
        smoothing=smoothing, image_ids_B=image_ids_B, own_rows=own_rows, symmetric=symmetric,
    )  # fmt: skip


def contrast_of(
    i2t_BG: Tensor,
    t2i_BG: Tensor,
    valid_B: Tensor,
    comm: Comm,
    *,
    smoothing: float = 0.0,
    image_ids_B: Tensor | None = None,
    own_rows: bool = False,
    symmetric: bool = True,
) -> Contrast:
    """The same of logits that are there already: local images against global texts, local texts against global images.
    The other arguments are those of :func:`contrast`."""
    near = LocalComm() if own_rows else comm
    valid_G = near.gather(valid_B, grad=False)
    positives_BG = _positives(valid_B, valid_G, image_ids_B, near)
    losses_B = [_cross_entropy(logits, positives_BG, valid_G, smoothing) for logits in (i2t_BG, t2i_BG)]
    mean = GlobalMean(valid_B, comm)
    loss_B = (losses_B[0] + losses_B[1]) / 2 if symmetric else losses_B[0]
    return Contrast(mean(loss_B), i2t_BG, t2i_BG, positives_BG, valid_G, mean)


def _positives(valid_B: Tensor, valid_G: Tensor, image_ids_B: Tensor | None, comm: Comm) -> Tensor:
    B, G = len(valid_B), len(valid_G)
    own = torch.arange(B, device=valid_B.device).unsqueeze(1) + comm.rank * B
    own_BG = own == torch.arange(G, device=valid_B.device)
    if image_ids_B is None:
        return own_BG
    same_BG = image_ids_B.unsqueeze(1) == comm.gather(image_ids_B, grad=False)
    return (same_BG & valid_G) | own_BG


def _cross_entropy(logits_BG: Tensor, positives_BG: Tensor, valid_G: Tensor, smoothing: float) -> Tensor:
    log_p_BG = logits_BG.float().masked_fill(~valid_G, -torch.inf).log_softmax(1).masked_fill(~valid_G, 0.0)
    hit_B = (log_p_BG * positives_BG).sum(1) / positives_BG.sum(1)
    return -(1 - smoothing) * hit_B - smoothing * log_p_BG.sum(1) / valid_G.sum().clamp(min=1)


def smoothing_floor(classes: int, smoothing: float) -> float:
    """Entropy of a smoothed one-hot target: the least a cross-entropy over ``classes`` can be."""
    spread = smoothing / classes
    top = 1 - smoothing + spread
    low = spread * math.log(spread) if spread else 0.0
    return -(top * math.log(top) + (classes - 1) * low)


def contrast_reference(global_batch: int, smoothing: float) -> Reference:
    """ln N for a model that knows nothing, and the floor that smoothing leaves."""
    return Reference(math.log(global_batch), smoothing_floor(global_batch, smoothing))
