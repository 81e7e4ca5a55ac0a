"""Attention from one modality's tokens to another's: to all of them, to the best, to a window of time, or linear.

Shape letters: B pairs, S tokens that ask, K tokens that are asked, D width, H heads, d head width (D / H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.models.attention import attend, merge_heads, split_heads
from isthmus.models.favor import favor_attention, orthogonal_directions


@dataclass(frozen=True)
class Pattern:
    """Which keys a query looks at.

    Attributes:
        kind: ``full``; ``top_k``, the best keys of each query (and those of equal score); ``banded``, keys near the
            query's place in time; ``favor``, all of them by random features.
        top_k: keys of a query.
        band: keys to either side of a query's place.
        features: random features of a head. seed: of their draw.
    """

    kind: Literal["full", "top_k", "banded", "favor"] = "full"
    top_k: int = 8
    band: int = 8
    features: int = 256
    seed: int = 0


def attend_across(
    query_BHSd: Tensor, key_BHKd: Tensor, value_BHKd: Tensor, asks_BS: Tensor, asked_BK: Tensor, pattern: Pattern
) -> Tensor:
    """What the queries see of the keys' values, [B, H, S, d]. A pair without a key sees zeros.

    Args:
        asks_BS, asked_BK: bool, tokens that are no padding; padding stands behind.
    """
    some_B = asked_BK.any(1)
    asked_BK = asked_BK | ~some_B.unsqueeze(1)
    if pattern.kind == "favor":
        directions = orthogonal_directions(pattern.features, query_BHSd.shape[-1], pattern.seed)
        seen = favor_attention(query_BHSd, key_BHKd, value_BHKd, asked_BK, directions)
    else:
        allowed = asked_BK[:, None, None, :]
        if pattern.kind == "top_k" and pattern.top_k < key_BHKd.shape[2]:
            allowed = _best_keys(query_BHSd, key_BHKd, allowed, pattern.top_k)
        elif pattern.kind == "banded":
            allowed = _near_keys(asks_BS, asked_BK, pattern.band).unsqueeze(1)
        seen = attend(query_BHSd, key_BHKd, value_BHKd, allowed)
    return seen * some_B.to(seen.dtype)[:, None, None, None]


@torch.no_grad()
def _best_keys(query_BHSd: Tensor, key_BHKd: Tensor, allowed: Tensor, k: int) -> Tensor:
    """bool [B, H, S, K]. Keys as good as the k-th are all in, so that which ones does not hang on their order."""
    scores = (query_BHSd @ key_BHKd.transpose(-1, -2)).float().masked_fill(~allowed, -torch.inf)
    return allowed & (scores >= scores.topk(k, dim=-1).values[..., -1:])


def _near_keys(asks_BS: Tensor, asked_BK: Tensor, band: int) -> Tensor:
    """bool [B, S, K]: both sequences span the same time, so query i of n stands at key (i + 1/2) / n x keys - 1/2."""
    S, K = asks_BS.shape[1], asked_BK.shape[1]
    queries_B1, keys_B1 = (x.sum(1, keepdim=True).clamp(min=1).float() for x in (asks_BS, asked_BK))
    place_BS = (torch.arange(S, device=asks_BS.device) + 0.5) / queries_B1 * keys_B1 - 0.5
    place_BS = torch.minimum(place_BS, keys_B1 - 1)  # padding rows look at the end rather than at nothing
    distance_BSK = (place_BS.unsqueeze(2) - torch.arange(K, device=asked_BK.device)).abs()
    return (distance_BSK <= band) & asked_BK.unsqueeze(1)


class CrossModal(nn.Module):
    """One direction of cross-attention; the residual is the caller's.

    Args:
        width: D. heads: H, which divides D.
        pattern: which keys are looked at.
        projections: False is attention without parameters, Q = x and K = V = y, on one head.
        zero_init: the output projection starts at zero, so that fused tokens start as the tokens themselves.
    """

    def __init__(self, width: int, heads: int, pattern: Pattern, *, projections: bool, zero_init: bool) -> None:
        super().__init__()
        self.heads, self.pattern, self.projections = heads if projections else 1, pattern, projections
        if not projections:
            return
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        if zero_init:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x_BSD: Tensor, asks_BS: Tensor, y_BKD: Tensor, asked_BK: Tensor) -> Tensor:
        """What each x sees among the y, [B, S, D]; rows of padding hold something of no meaning."""
        asked = (self.query(x_BSD), self.key(y_BKD), self.value(y_BKD)) if self.projections else (x_BSD, y_BKD, y_BKD)
        query, key, value = (split_heads(part, self.heads) for part in asked)
        seen_BSD = merge_heads(attend_across(query, key, value, asks_BS, asked_BK, self.pattern))
        return self.output(seen_BSD) if self.projections else seen_BSD
