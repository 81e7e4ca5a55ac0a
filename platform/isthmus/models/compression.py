"""Shortening a sequence of image tokens: how many stay at which layer, which, and what becomes of the rest.

The mechanics are EViT's (Liang et al. 2022): each chosen layer keeps the tokens with the highest scores, in their old
order, and puts one fused token, the score-weighted mean of the others, behind them. A later layer treats that token
like any other. Counts depend on the rates alone, never on the content, so tensors stay rectangular.

Shape letters: B images, S tokens of a layer with prefix, N image tokens without it, K of those that stay, C width,
H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.config import CompressionConfig, TokenDropConfig

FUSED = -1
"""Number of a fused token among the image's own tokens, which count from 0."""


@dataclass(frozen=True)
class Step:
    """What one layer does: of ``given`` image tokens it keeps ``kept``; ``left`` go on, the fused one among them."""

    layer: int
    given: int
    kept: int
    left: int


def progress(config: CompressionConfig, step: int) -> float:
    """How far the rates have come down at a training step: 0 during the warm-up, 1 once it is over, a cosine between.

    EViT's schedule. A function of the step alone, so all ranks drop alike.
    """
    done = step - config.warmup_steps
    if done < 0:
        return 0.0
    if done >= config.shrink_steps:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * done / config.shrink_steps))


def schedule(config: CompressionConfig, tokens: int, share: float = 1.0) -> tuple[Step, ...]:
    """What each chosen layer does to an image of ``tokens`` tokens, prefix not counted.

    Args:
        config: the rates.
        tokens: N of the image.
        share: of :func:`progress`; 0 keeps everything.
    """
    steps, given = [], tokens
    for layer, rate in zip(config.layers, config.rates, strict=True):
        rate = 1.0 - share * (1.0 - rate)
        of = given if config.keep_of == "layer" else tokens
        # 0.7 x 30 is 21.000000000000004 for a processor: that is no reason to keep one more.
        kept = min(given, max(1, math.ceil(rate * of - 1e-9)))
        left = kept + (1 if config.fuse and kept < given else 0)
        steps.append(Step(layer, given, kept, left))
        given = left
    return tuple(steps)


def distribution(scores_BN: Tensor) -> Tensor:
    """Scores, none of them negative, divided by their sum; float32. Scores of zero are all alike."""
    scores_BN = scores_BN.float()
    total_B1 = scores_BN.sum(1, keepdim=True)
    return torch.where(total_B1 > 0, scores_BN / total_B1.clamp(min=1e-30), 1.0 / scores_BN.shape[1])


def attention_score(query_BHSd: Tensor, key_BHNd: Tensor) -> Tensor:
    """Attention that the keys get, mean over heads and queries, float32 [B, N]; sums to 1 over all keys."""
    with torch.autocast(query_BHSd.device.type, enabled=False):  # a choice is no place for rounding
        logits = query_BHSd.float() @ key_BHNd.float().transpose(-1, -2) * query_BHSd.shape[-1] ** -0.5
        return logits.softmax(-1).mean((1, 2))


def mixed_score(image_BN: Tensor, text_BN: Tensor | None, guided_B: Tensor | None, balance: float) -> Tensor:
    """balance x image's score + (1 - balance) x text's, each a distribution; the image's alone without a text, and in
    rows that ``guided_B`` (bool) leaves out."""
    image_BN = distribution(image_BN)
    if text_BN is None:
        return image_BN
    both_BN = balance * image_BN + (1.0 - balance) * distribution(text_BN)
    return both_BN if guided_B is None else torch.where(guided_B.unsqueeze(1), both_BN, image_BN)


def select(scores_BN: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Places of the ``kept`` highest scores and of the others, each ascending, int64. Of equal scores the first wins,
    on every device."""
    order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
    return order_BN[:, :kept].sort(1).values, order_BN[:, kept:].sort(1).values


def compress(
    tokens_BNC: Tensor, scores_BN: Tensor, kept: int, *, fuse: bool = True, detach: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens that stay, in order, and behind them the fused one; and the place of each, int64 (``FUSED`` for it).

    Args:
        tokens_BNC: image tokens without prefix.
        scores_BN: one each, none negative.
        kept: how many stay. All of them: nothing changes, and nothing is fused.
        fuse: False drops the others.
        detach: no gradient through the fused token's weights.
    """
    B, N, _ = tokens_BNC.shape
    if kept >= N:
        return tokens_BNC, torch.arange(N, device=tokens_BNC.device).expand(B, N)
    stay_BK, drop = select(scores_BN.detach(), kept)
    out_BKC = _rows(tokens_BNC, stay_BK)
    if not fuse:
        return out_BKC, stay_BK
    weights = distribution(scores_BN.gather(1, drop))
    weights = (weights.detach() if detach else weights).to(tokens_BNC.dtype)
    fused_B1C = weights.unsqueeze(1) @ _rows(tokens_BNC, drop)
    mark_B1 = torch.full_like(stay_BK[:, :1], FUSED)
    return torch.cat([out_BKC, fused_B1C], 1), torch.cat([stay_BK, mark_B1], 1)


@torch.no_grad()
def drop_frozen(tokens_BND: Tensor, config: TokenDropConfig) -> Tensor:
    """Frozen encoder's tokens [B, N, D], thinned out by their own likeness: [B, K, D] of the same type.

    The score of a token is the softmax of its cosine to the class token, or to the mean token where there is none. No
    text has a say, so what comes of an image is the same for all texts.
    """
    prefix = int(config.class_token)
    patches_BND, unit_BND = tokens_BND[:, prefix:], F.normalize(tokens_BND.float(), dim=-1)
    asking_BD = unit_BND[:, 0] if prefix else F.normalize(tokens_BND.float().mean(1), dim=-1)
    scores_BN = (config.sharpness * (unit_BND[:, prefix:] * asking_BD.unsqueeze(1)).sum(2)).softmax(1)
    left_BKD, _ = compress(patches_BND, scores_BN, _dropping(config, patches_BND.shape[1]).kept, fuse=config.fuse)
    return torch.cat([tokens_BND[:, :prefix], left_BKD], 1)


def tokens_left(tokens: int, config: TokenDropConfig | None) -> int:
    """How many of an image's tokens :func:`drop_frozen` leaves."""
    if config is None:
        return tokens
    prefix = int(config.class_token)
    return prefix + _dropping(config, tokens - prefix).left


def _dropping(config: TokenDropConfig, tokens: int) -> Step:
    [step] = schedule(CompressionConfig(layers=(0,), keep=(config.keep,), fuse=config.fuse), tokens)
    return step


def renumber(known_BN: Tensor, chosen_BK: Tensor) -> Tensor:
    """Numbers among the image's own tokens of what a layer chose, given those of what the layer was given."""
    fused = chosen_BK == FUSED
    return known_BN.gather(1, chosen_BK.masked_fill(fused, 0)).masked_fill(fused, FUSED)


@torch.no_grad()
def overlap(one_BK: Tensor, other_BK: Tensor) -> Tensor:
    """Share of one selection's own tokens that the other has too, float32 [B]; fused ones count in neither."""
    same_BKK = (one_BK.unsqueeze(2) == other_BK.unsqueeze(1)) & (one_BK != FUSED).unsqueeze(2)
    return same_BKK.any(2).float().sum(1) / (one_BK != FUSED).sum(1).clamp(min=1)


def kept_share(steps: Sequence[Step], tokens: int) -> float:
    """Image tokens behind the last layer that drops any, as a share of those at first."""
    return steps[-1].left / tokens if steps else 1.0


def _rows(tokens_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return tokens_BNC.gather(1, index_BK.unsqueeze(2).expand(-1, -1, tokens_BNC.shape[2]))
