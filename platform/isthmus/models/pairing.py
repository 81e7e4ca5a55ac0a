"""Small parts around a pair of token sequences: into the shared space, pooled, and judged.

Shape letters: B pairs, N tokens, D frozen width, E shared width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.noise import KeyedDropout, subkeys


class SideProjection(nn.Module):
    """W x + b of each token. Our completion: a layer norm without parameters and dropout before it, and with ``kind``
    ``mlp`` a residual network of one hidden layer behind it. All that is wide is frozen, so nothing wide is
    differentiated."""

    def __init__(self, width: int, embed: int, dropout: float, *, kind: Literal["linear", "mlp"], normalise: bool):
        super().__init__()
        self.normalise, self.dropout = normalise, KeyedDropout(dropout)
        self.linear = nn.Linear(width, embed)
        self.up: nn.Linear | None = nn.Linear(embed, embed) if kind == "mlp" else None
        self.down: nn.Linear | None = nn.Linear(embed, embed) if kind == "mlp" else None

    def forward(self, x_BND: Tensor, noise_BN: Tensor | None = None) -> Tensor:
        if self.normalise:
            x_BND = F.layer_norm(x_BND, x_BND.shape[-1:])
        out_BNE: Tensor = self.linear(self.dropout(x_BND, noise_BN))
        if self.up is None or self.down is None:
            return out_BNE
        deeper: Tensor = self.down(F.gelu(self.up(out_BNE)))
        return out_BNE + deeper


class PairProjection(nn.Module):
    """Both sides' frozen tokens -> [B, N, E], each by its own map.

    Args:
        widths: frozen widths of the first and the second side.
        kind, normalise: see :class:`SideProjection`.
    """

    def __init__(
        self, widths: tuple[int, int], embed: int, dropout: float, *, kind: Literal["linear", "mlp"], normalise: bool
    ) -> None:
        super().__init__()

        self.first, self.second = (
            SideProjection(width, embed, dropout, kind=kind, normalise=normalise) for width in widths
        )

    def forward(self, first_BND: Tensor, second_BND: Tensor, noise_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``noise_B``: int64 keys of the pairs, for dropout."""
        first = self.first(first_BND, _by_place(noise_B, first_BND.shape[1]))
        return first, self.second(second_BND, _by_place(noise_B, second_BND.shape[1]))

    def one(self, number: int, tokens_BND: Tensor) -> Tensor:
        """One side's, without dropout's keys: for inference."""
        out: Tensor = (self.first, self.second)[number](tokens_BND)
        return out


class MatchHead(nn.Module):
    """Logits [B, 2] of 'no' and 'yes': both sides' pooled vectors, one behind the other, through one hidden layer."""

    def __init__(self, embed: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2 * embed, embed), nn.Linear(embed, 2)

    def forward(self, first_BE: Tensor, second_BE: Tensor) -> Tensor:
        logits: Tensor = self.out(F.gelu(self.hidden(torch.cat([first_BE, second_BE], -1))))
        return logits


def pooled(tokens_BNE: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over tokens that are no padding, [B, E]; zeros where there is none."""
    weight_BN1 = mask_BN.unsqueeze(-1).to(tokens_BNE.dtype)
    return (tokens_BNE * weight_BN1).sum(1) / weight_BN1.sum(1).clamp(min=1)


def _by_place(noise_B: Tensor | None, places: int) -> Tensor | None:
    """Keys [B, places] of a sequence's tokens."""
    return None if noise_B is None else subkeys(noise_B.unsqueeze(1), torch.arange(places, device=noise_B.device))
