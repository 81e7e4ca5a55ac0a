"""Softmax attention in linear time by positive random features (FAVOR+: Choromanski et al. 2021, section 2.3).

exp(q k) = E[phi(q) phi(k)] with phi(x) = exp(w x - |x|^2 / 2) for normal w. With m such w, drawn orthogonal to one
another in blocks, attention is phi(Q) (phi(K)^T V), which costs S m d instead of S K d. Its error falls as 1 / sqrt(m).

Shape letters: B pairs, H heads, S tokens that ask, K tokens that are asked, d head width, m random features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def favor_attention(
    query_BHSd: Tensor, key_BHKd: Tensor, value_BHKd: Tensor, asked_BK: Tensor, directions_md: Tensor
) -> Tensor:
    """What the queries see, [B, H, S, d], as softmax(Q K^T / sqrt(d)) V would have it, but for the features' error.

    Args:
        asked_BK: bool, keys that are no padding; at least one in each row.
        directions_md: as :func:`orthogonal_directions` draws them.
    """
    with torch.autocast(query_BHSd.device.type, enabled=False):  # exponents in bfloat16 would be off by far more
        return _attention(query_BHSd, key_BHKd, value_BHKd, asked_BK, directions_md)


def _attention(
    query_BHSd: Tensor, key_BHKd: Tensor, value_BHKd: Tensor, asked_BK: Tensor, directions_md: Tensor
) -> Tensor:
    scale = query_BHSd.shape[-1] ** -0.25
    wide = torch.promote_types(query_BHSd.dtype, torch.float32)
    directions = directions_md.to(query_BHSd.device, wide)
    padding_BHK1 = ~asked_BK[:, None, :, None]
    query_log, key_log = (_log_features(x.to(wide) * scale, directions) for x in (query_BHSd, key_BHKd))
    key_log = key_log.masked_fill(padding_BHK1, -torch.inf)
    # Factors common to a query's features, or to all keys', cancel between numerator and denominator.
    query_BHSm = (query_log - query_log.amax(-1, keepdim=True).detach()).exp()
    key_BHKm = (key_log - key_log.amax((-2, -1), keepdim=True).detach()).exp()
    seen = query_BHSm @ (key_BHKm.transpose(-1, -2) @ value_BHKd.to(wide))
    total = query_BHSm @ key_BHKm.sum(-2).unsqueeze(-1)
    return (seen / total.clamp(min=torch.finfo(wide).tiny)).to(value_BHKd.dtype)


def _log_features(x: Tensor, directions_md: Tensor) -> Tensor:
    return x @ directions_md.T - x.square().sum(-1, keepdim=True) / 2


@functools.lru_cache(maxsize=16)
def orthogonal_directions(features: int, width: int, seed: int) -> Tensor:
    """Normal vectors that are orthogonal within each block of ``width``, float64 [features, width] on the CPU.

    A pure function of its arguments, so all processes have the same and no checkpoint needs to hold them.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    blocks = []
    for _ in range(-(-features // width)):
        q, r = torch.linalg.qr(normal(width, width))
        blocks.append((q * r.diagonal().sign()).T)  # the signs make it uniform over all rotations
    lengths = normal(features, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths
