"""The projectors of freeze-align (Maniparambil et al. 2024): small networks that carry frozen features into one space.

Shape letters: B batch, N tokens, D frozen width, E shared width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.models.noise import KeyedDropout, subkeys

_CACHED_VALUES = 1 << 18  # a mebibyte of float32: what a core's own cache holds


class TokenProjector(nn.Module):
    """Norm and dropout, then a linear path and a two-layer path, added. [..., D] -> [..., E].

    ``noise`` in this file: int64 keys of the vectors (shape ...) or of the sequences [B], for dropout.
    """

    def __init__(self, width: int, embed: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), KeyedDropout(dropout)
        self.linear, self.up, self.down = nn.Linear(width, embed), nn.Linear(width, embed), nn.Linear(embed, embed)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = self.dropout(self.norm(x), noise)
        return self.linear(x) + self.down(nn.functional.gelu(self.up(x)))


class HeadProjector(nn.Module):
    """p = linear(x); norm(p + dropout(linear(gelu(p)))). [..., D] -> [..., E]."""

    def __init__(self, width: int, embed: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, embed), nn.Linear(embed, embed)
        self.norm, self.dropout = nn.LayerNorm(embed), KeyedDropout(dropout)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        p = self.first(x)
        return self.norm(p + self.dropout(self.second(nn.functional.gelu(p)), noise))


class ImageProjector(nn.Module):
    """Image tokens [B, N, D] -> one vector [B, E].

    Args:
        width, embed, dropout: D, E, and the projectors' dropout.
        pool_first: average the frozen tokens and project the average, one projection an image instead of N. Not the
            same function: the projector is not linear.
        class_token: the first token is a class token with a projector of its own, added to the others' average.
    """

    def __init__(self, width: int, embed: int, dropout: float, *, pool_first: bool, class_token: bool) -> None:
        super().__init__()
        self.pool_first = pool_first
        self.tokens = TokenProjector(width, embed, dropout)
        self.class_token = TokenProjector(width, embed, dropout) if class_token else None

    def forward(self, x_BND: Tensor, noise_B: Tensor | None = None) -> Tensor:
        """``x_BND`` may be of another type than the parameters, such as a cache's float16."""
        dtype = self.tokens.linear.weight.dtype
        rest_BND = x_BND[:, 1:] if self.class_token is not None else x_BND
        if self.pool_first:
            out_BE = self.tokens(mean_token(rest_BND).to(dtype), noise_B)
        else:
            out_BE = self.tokens(rest_BND.to(dtype), _by_place(noise_B, rest_BND.shape[1])).mean(1)
        return out_BE if self.class_token is None else out_BE + self.class_token(x_BND[:, 0].to(dtype), noise_B)


class TextProjector(nn.Module):
    """Text features -> one vector [B, E]: per token and averaged over the mask, or from the pooled sentence vector."""

    def __init__(self, width: int, embed: int, dropout: float, *, per_token: bool) -> None:
        super().__init__()
        self.tokens = TokenProjector(width, embed, dropout) if per_token else None
        self.head = HeadProjector(embed if per_token else width, embed, dropout)

    def forward(self, x: Tensor, mask_BT: Tensor | None = None, noise_B: Tensor | None = None) -> Tensor:
        """``x`` is [B, T, D] with ``mask_BT`` for per-token projectors, else [B, D]."""
        if self.tokens is None:
            return self.head(x, noise_B)
        weight_BT1 = (mask_BT if mask_BT is not None else torch.ones_like(x[..., 0])).unsqueeze(-1).to(x.dtype)
        tokens_BTE = self.tokens(x, _by_place(noise_B, x.shape[1]))
        return self.head((tokens_BTE * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1), noise_B)


def mean_token(x_BND: Tensor) -> Tensor:
    """The mean over tokens, float32 [B, D].

    Stored float16 features are widened a few images at a time on a processor: all at once, twice the batch's features
    would go to memory and come back.
    """
    if x_BND.dtype == torch.float32 or x_BND.device.type != "cpu" or x_BND.requires_grad:
        return x_BND.float().mean(1)
    B, N, D = x_BND.shape
    out_BD, share_1N = torch.empty(B, D), torch.full((1, N), 1 / N)
    rows = max(1, _CACHED_VALUES // (N * D))
    for start in range(0, B, rows):
        out_BD[start : start + rows] = (share_1N @ x_BND[start : start + rows].float())[:, 0]
    return out_BD


def _by_place(noise_B: Tensor | None, places: int) -> Tensor | None:
    """Keys [B, places] of a sequence's vectors."""
    return None if noise_B is None else subkeys(noise_B.unsqueeze(1), torch.arange(places, device=noise_B.device))
