"""Small trained encoders of sequences in time: patches of a sound, frames of a clip.

No pretrained audio encoder can be had without a model hub, so the audio side is trained from nothing, with the rest of
the method. Its input is the Audio Spectrogram Transformer's (Gong et al. 2021); its size, and that a clip's frames get
such an encoder too, so that what happens when can be told, are our completion.

Shape letters: B sequences, N tokens, P values of a patch, D frozen width, W width of the encoder, C columns, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.attention import attend, merge_heads, split_heads


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward layer of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax does not see a bias of the keys
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BNW: Tensor, allowed: Tensor | None) -> Tensor:
        """``allowed``: bool, broadcastable to [B, H, N, N], True for the tokens that may be looked at."""
        normal = self.first_norm(x_BNW)
        query, key, value = (split_heads(part(normal), self.heads) for part in (self.query, self.key, self.value))
        x_BNW = x_BNW + self.output(merge_heads(attend(query, key, value, allowed)))
        return x_BNW + self.down(F.gelu(self.up(self.second_norm(x_BNW))))


class SequenceEncoder(nn.Module):
    """Tokens -> a linear map, positions, blocks, a norm.

    Args:
        given: width of the tokens.
        columns: most places in time.
        rows: tokens at one time.
        width, layers, heads: W, number of blocks, heads of each.
    """

    def __init__(self, given: int, columns: int, rows: int, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(given, width)
        self.time_CW = nn.Parameter(torch.randn(columns, width) * 0.02)
        self.row_RW = nn.Parameter(torch.randn(rows, width) * 0.02) if rows > 1 else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """[B, N, W]. Tokens stand column by column; where ``mask_BN`` is False nothing looks at them."""
        places_CRW = self.time_CW.unsqueeze(1)
        if self.row_RW is not None:
            places_CRW = places_CRW + self.row_RW
        x_BNW = self.input(x_BND.to(self.input.weight.dtype)) + places_CRW.flatten(0, 1)
        allowed = None if mask_BN is None else mask_BN.bool()[:, None, None, :]
        for block in self.blocks:
            x_BNW = block(x_BNW, allowed)
        out: Tensor = self.norm(x_BNW)
        return out
