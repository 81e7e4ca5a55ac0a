"""What cross-attention between two modalities is trained for, one value a pair.

Shape letters: B pairs, N tokens of a side, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["sum", "mean"]
GENTLE = 0.05
"""Added to the attended context's variance where it is normalised. The context of an output map that starts at zero is
zero, and would meet a slope without bound there."""


def literal_rows(attended_BND: Tensor, mask_BN: Tensor, reduction: Reduction) -> Tensor:
    """|F' - F|^2 of fused and plain tokens, [B]; since F' = F + attended, it is the attended context's squared norm.

    That is the loss as the method's text writes it, and its least value is attention that says nothing: it switches
    the cross-attention off. :func:`aligned_rows` is the loss to learn with.

    Args:
        mask_BN: bool; rows of padding do not count.
        reduction: ``sum`` over tokens and channels, as written, or their ``mean``.
    """
    return _reduced(attended_BND.float().square(), mask_BN, reduction)


def aligned_rows(attended_BND: Tensor, tokens_BND: Tensor, mask_BN: Tensor, reduction: Reduction) -> Tensor:
    """|LN(attended) - LN(token)|^2 with the token held fixed, [B]: the context that a token gathers from the other
    modality is to reproduce it. Our completion, after SCAN (Lee et al. 2018) and SPARC (Bica et al. 2024).

    Arguments are those of :func:`literal_rows`. ``mean`` is 1 where the context is zero, and 2 where it has nothing to
    do with the token.
    """
    width = attended_BND.shape[-1:]
    gap_BND = F.layer_norm(attended_BND.float(), width, eps=GENTLE) - F.layer_norm(tokens_BND.detach().float(), width)
    return _reduced(gap_BND.square(), mask_BN, reduction)


def agreement_rows(attended_BND: Tensor, tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean cosine of tokens and what they attend to, [B]: how well the other modality explains them (SCAN). What has
    little norm counts for little; see GENTLE."""
    attended, tokens = attended_BND.float(), F.normalize(tokens_BND.float(), dim=-1)
    length_BN = (attended.square().sum(-1) + GENTLE * attended.shape[-1]).sqrt()
    cosine_BN = (attended * tokens).sum(-1) / length_BN
    return (cosine_BN * mask_BN).sum(1) / mask_BN.sum(1).clamp(min=1)


@torch.no_grad()
def attended_share_rows(attended_BND: Tensor, tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """|attended| / |tokens| of each pair, [B]: near zero, cross-attention has been switched off."""
    norms = [(x.float() * mask_BN.unsqueeze(-1)).flatten(1).norm(dim=1) for x in (attended_BND, tokens_BND)]
    return norms[0] / norms[1].clamp(min=1e-12)


def _reduced(squares_BND: Tensor, mask_BN: Tensor, reduction: Reduction) -> Tensor:
    sums_B = squares_BND.masked_fill(~mask_BN.unsqueeze(-1), 0.0).sum((1, 2))
    if reduction == "sum":
        return sums_B
    return sums_B / (mask_BN.sum(1).clamp(min=1) * squares_BND.shape[-1])
