"""Multi-head attention as BERT has it: post-norm, biases everywhere, scores in scaled_dot_product_attention.

Shape letters: B sequences, S rows of a sequence that ask, K rows that are asked, R rows of all sequences without
padding, N image tokens, D image width, X queries x heads, M model width, H heads, d head width (M / H).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.models.headwise import narrow_heads, widen_heads
from isthmus.models.noise import KeyedDropout, subkeys
from isthmus.models.packing import Packing

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention block, each [B, H, K, d]."""


def split_heads(x_BSM: Tensor, heads: int) -> Tensor:
    """[B, S, M] -> [B, H, S, d]."""
    return x_BSM.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHSd: Tensor) -> Tensor:
    """[B, H, S, d] -> [B, S, M]."""
    return x_BHSd.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of queries [B, H, S, d] to keys and values [B, H, K, d]: what they see, [B, H, S, d].

    Args:
        allowed: bool, broadcastable to [B, H, S, K], True where a row may look; None lets all look at all.
        drop: dropout of the attention weights [B, H, S, K]; None where there is none.
    """
    if drop is not None or (query.device.type == "cpu" and query.dtype == torch.bfloat16):
        return _written_out(query, key, value, allowed, drop)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, drop: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The same sum as matrix products, the softmax in float32. torch's fused kernel takes CPUs two to four times as
    long to differentiate in bf16, and draws dropout from the process's own generator."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights if drop is None else drop(weights)) @ value


class SelfAttention(nn.Module):
    """Self-attention block with residual and post-norm. Queries and text share its weights.

    Args:
        width, heads: M and H.
        dropout: on the attention weights and on the block's output.
        eps: of the layer norm.
    """

    def __init__(self, width: int, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.weights_dropout = heads, KeyedDropout(dropout)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = KeyedDropout(dropout)

    def forward(
        self,
        x_RM: Tensor,
        packing: Packing,
        allowed: Tensor | None,
        past: KeyValue | None = None,
        leading: int | None = None,
        noise_BS: Tensor | None = None,
    ) -> tuple[Tensor, Packing, KeyValue]:
        """Output rows [R, M], their packing, and this block's keys and values, those of ``past`` first.

        Args:
            x_RM: the rows.
            packing: where they stand.
            allowed: bool, broadcastable to [B, H, S, K], True where a row may look; None lets all look at all.
                Nothing may look at padding.
            past: keys and values of rows that came before.
            leading: only so many first places of each sequence ask, and are put out; all are asked.
            noise_BS: int64 keys of the places, for dropout.
        """
        key, value = (split_heads(packing.spread(part(x_RM)), self.heads) for part in (self.key, self.value))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        if leading is not None:
            packing, x_RM = packing.leading(x_RM, leading)
            allowed = allowed[..., :leading, :] if allowed is not None else None
            noise_BS = noise_BS[:, :leading] if noise_BS is not None else None
        query = split_heads(packing.spread(self.query(x_RM)), self.heads)
        seen = attend(query, key, value, allowed, _drop(self.weights_dropout, noise_BS, self.heads))
        seen_RM = packing.collect(merge_heads(seen))
        noise_R = packing.collect_keys(noise_BS)
        return self.norm(self.dropout(self.output(seen_RM), noise_R) + x_RM), packing, (key, value)


def _drop(dropout: KeyedDropout, noise_BS: Tensor | None, heads: int) -> Callable[[Tensor], Tensor] | None:
    """Dropout of attention weights [B, H, S, K] by the keys of the rows that ask."""
    if not dropout.awake:
        return None
    return functools.partial(dropout, keys=_by_head(noise_BS, heads))


def _by_head(noise_BS: Tensor | None, heads: int) -> Tensor | None:
    """Keys [B, H, S] of attention weights."""
    if noise_BS is None:
        return None
    return subkeys(noise_BS.unsqueeze(1), torch.arange(heads, device=noise_BS.device).unsqueeze(1))


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens and a per-channel affine map that is still to be applied: value = tokens x scale + shift.

    Keeping the trainable map of a norm apart leaves the tokens themselves constant where the encoder is frozen: nothing
    of their size is differentiated, and other ranks' tokens can be fetched without gradient. What reads them folds the
    map into its own weights.
    """

    tokens_BND: Tensor
    scale_D: Tensor | None = None
    shift_D: Tensor | None = None

    def __len__(self) -> int:
        return int(self.tokens_BND.shape[0])


@dataclass(frozen=True)
class ImageMemory:
    """What the cross-attention blocks read of the images.

    Attributes:
        image: the tokens.
        kv: by cross-attention block, keys and values; None where the blocks work on the tokens directly.
    """

    image: ImageTokens
    kv: tuple[KeyValue, ...] | None = None

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, index: Tensor) -> ImageMemory:
        """The chosen images, in the order of ``index``."""
        if self.kv is None:
            return ImageMemory(replace(self.image, tokens_BND=self.image.tokens_BND[index]))
        return ImageMemory(self._counted(len(index)), tuple((k[index], v[index]) for k, v in self.kv))

    def _counted(self, images: int) -> ImageTokens:
        """So many rows without content: where keys and values exist the blocks read no tokens, only count them."""
        return replace(self.image, tokens_BND=self.image.tokens_BND[:1, :1].expand(images, 1, -1))

    @staticmethod
    def cat(parts: Sequence[ImageMemory]) -> ImageMemory:
        """The parts' images, one after another. All parts must be of one kind and share their map."""
        if parts[0].kv is None:
            tokens_BND = torch.cat([part.image.tokens_BND for part in parts])
            return ImageMemory(replace(parts[0].image, tokens_BND=tokens_BND))
        kv = tuple(
            (torch.cat([k for k, _ in blocks]), torch.cat([v for _, v in blocks]))
            for blocks in zip(*(part.kv or () for part in parts), strict=True)
        )
        return ImageMemory(parts[0]._counted(sum(len(part) for part in parts)), kv)


class ImageLinear(nn.Linear):
    """Key or value projection of image tokens, given out as weights that hold the tokens' affine map.

    W (x * scale + shift) + b = (W * scale) x + (W shift + b). They are given out by ``__call__``, so that sharded
    parameters are whole when they are read.
    """

    def forward(self, image: ImageTokens) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Weight [M, D] and bias [M] to apply to ``image.tokens_BND``."""
        if image.scale_D is None or image.shift_D is None:
            return self.weight * 1.0, self.bias * 1.0
        scale_D, shift_D = image.scale_D.to(self.weight.dtype), image.shift_D.to(self.weight.dtype)
        return self.weight * scale_D, F.linear(shift_D, self.weight, self.bias)


class CrossAttention(nn.Module):
    """Queries attend to image tokens; residual and post-norm.

    Two forms of the same sum. *Projected*: keys and values W x of every image token, made once per image. *Direct*:
    q^T (W_k x) = (W_k^T q)^T x and sum p (W_v x) = W_v (sum p x), so with few queries the N projections of width D
    need never be made. Which is cheaper is arithmetic: :meth:`direct_is_cheaper`.
    """

    def __init__(self, width: int, image_width: int, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.weights_dropout = heads, KeyedDropout(dropout)
        self.query = nn.Linear(width, width)
        self.key, self.value = ImageLinear(image_width, width), ImageLinear(image_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = KeyedDropout(dropout)

    @staticmethod
    def direct_is_cheaper(queries: int, tokens: int, width: int, heads: int, uses: float) -> bool:
        """Multiplications of ``uses`` direct passes, 2 Q (M + H N) D each, against those of one projection, 2 N M D."""
        return uses * queries * (width + heads * tokens) < tokens * width

    def project(self, image: ImageTokens) -> KeyValue:
        """Keys and values of the image tokens, each [B, H, N, d]."""
        key, value = (F.linear(image.tokens_BND, *linear(image)) for linear in (self.key, self.value))
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x_BSM: Tensor, image: ImageTokens, kv: KeyValue | None, noise_BS: Tensor | None = None) -> Tensor:
        query_BHSd = split_heads(self.query(x_BSM), self.heads)
        if kv is None:
            seen = self._direct(query_BHSd, image, noise_BS)
        else:
            seen = merge_heads(attend(query_BHSd, *kv, None, _drop(self.weights_dropout, noise_BS, self.heads)))
        return self.norm(self.dropout(self.output(seen), noise_BS) + x_BSM)

    def _direct(self, query_BHSd: Tensor, image: ImageTokens, noise_BS: Tensor | None) -> Tensor:
        B, H, S, d = query_BHSd.shape
        tokens_BND = image.tokens_BND
        (key_MD, key_M), (value_MD, value_M) = self.key(image), self.value(image)
        rows_HRd = query_BHSd.transpose(0, 1).reshape(H, B * S, d) * d**-0.5
        asked_BXD = widen_heads(rows_HRd, key_MD.view(H, d, -1).to(rows_HRd.dtype)).view(B, S * H, -1)
        # The key bias adds one number to all scores of a row, which softmax cannot see: its gradient is zero in the
        # projected form too (up to rounding). It enters here so that its gradient is zero rather than absent.
        shift_BX1 = torch.bmm(rows_HRd, key_M.view(H, d, 1)).view(H, B, S).permute(1, 2, 0).reshape(B, S * H, 1)
        scores_BXN = torch.bmm(asked_BXD, tokens_BND.transpose(1, 2)) + shift_BX1
        exact = torch.promote_types(scores_BXN.dtype, torch.float32)
        weights_BXN = scores_BXN.softmax(-1, dtype=exact).to(tokens_BND.dtype)
        if self.weights_dropout.awake:
            keys_BHS = _by_head(noise_BS, H)
            keys_BX = keys_BHS.transpose(1, 2).flatten(1) if keys_BHS is not None else None
            weights_BXN = self.weights_dropout(weights_BXN, keys_BX)
        mixed_RHD = torch.bmm(weights_BXN, tokens_BND).view(B * S, H, -1)
        seen_HRd = narrow_heads(mixed_RHD, value_MD.view(H, d, -1).to(mixed_RHD.dtype))
        share_HR1 = weights_BXN.sum(-1).view(B * S, H).t().unsqueeze(-1)  # 1 but for dropout
        seen_HRd = seen_HRd + share_HR1 * value_M.view(H, 1, d)
        return seen_HRd.view(H, B, S, d).permute(1, 2, 0, 3).reshape(B, S, H * d)
