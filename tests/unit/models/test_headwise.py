"""Per-head products against einsum."""

from __future__ import annotations

import pytest
import torch

from isthmus.models.headwise import narrow_heads, widen_heads

R, H, d, D = 6, 3, 4, 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("product", "equation", "rows"),
    [(widen_heads, "hrd,hdk->rhk", (H, R, d)), (narrow_heads, "rhk,hdk->hrd", (R, H, D))],
    ids=["widen", "narrow"],
)
def test_forward_and_gradients_equal_einsum(product, equation: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in (rows, (H, d, D))]
    found = []
    for function in (product, lambda a, b: torch.einsum(equation, a, b)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
        assert plain.abs().sum() > 0


def test_rows_and_their_slopes_lie_head_within_row() -> None:
    leaf, weight = torch.randn(R, H, D, requires_grad=True), torch.randn(H, d, D)
    narrow_heads(leaf, weight).sum().backward()
    assert leaf.grad.is_contiguous() and leaf.grad.shape == (R, H, D)
    assert widen_heads(torch.randn(H, R, d), weight).is_contiguous()


def test_numerical_gradient() -> None:
    for product, rows in ((widen_heads, (H, R, d)), (narrow_heads, (R, H, D))):
        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in (rows, (H, d, D))]
        assert torch.autograd.gradcheck(product, inputs)
