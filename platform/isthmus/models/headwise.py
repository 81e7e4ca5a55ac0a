"""Matrix products with one matrix per attention head, on rows that are laid out head by head or head within row.

``torch.bmm`` alone puts its heads outermost, and what reads its result per image then copies it: where rows are as wide
as image tokens, those copies take longer than the softmax between them. These two write and read the inner layout
directly.

Shape letters: R rows (images x queries), H heads, d head width, D image width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widen_heads(rows_HRd: Tensor, weight_HdD: Tensor) -> Tensor:
    """Each head's rows times its own matrix, [R, H, D] contiguous. Both of one dtype."""
    out: Tensor = _Widen.apply(rows_HRd, weight_HdD)
    return out


def narrow_heads(rows_RHD: Tensor, weight_HdD: Tensor) -> Tensor:
    """Each head's rows times the transpose of its own matrix, [H, R, d]. Both of one dtype."""
    out: Tensor = _Narrow.apply(rows_RHD, weight_HdD)
    return out


def _inner(a_HRx: Tensor, b_HxD: Tensor) -> Tensor:
    out_RHD = a_HRx.new_empty(a_HRx.shape[1], a_HRx.shape[0], b_HxD.shape[2])
    torch.bmm(a_HRx, b_HxD, out=out_RHD.transpose(0, 1))
    return out_RHD


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_HRd: Tensor, weight_HdD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_HRd, weight_HdD)
        return _inner(rows_HRd, weight_HdD)

    @staticmethod
    def backward(ctx: Any, slope_RHD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows_HRd, weight_HdD = ctx.saved_tensors
        slope_HRD = slope_RHD.transpose(0, 1)
        return torch.bmm(slope_HRD, weight_HdD.transpose(1, 2)), torch.bmm(rows_HRd.transpose(1, 2), slope_HRD)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RHD: Tensor, weight_HdD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RHD, weight_HdD)
        return torch.bmm(rows_RHD.transpose(0, 1), weight_HdD.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, slope_HRd: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows_RHD, weight_HdD = ctx.saved_tensors
        return _inner(slope_HRd, weight_HdD), torch.bmm(slope_HRd.transpose(1, 2), rows_RHD.transpose(0, 1))
