"""The loss through a frozen output layer, against plain cross-entropy over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.losses.language import CHUNK_ELEMENTS, frozen_head_loss

K, M, V = 23, 8, 50


def parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(M, V).to(dtype).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, M, generator=generator))
    return torch.randn(K, M, generator=generator).to(dtype), torch.randint(V, (K,), generator=generator), head


def plain(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


@pytest.mark.parametrize("rows", [1, 7, 23, 100, None])
@pytest.mark.parametrize("capped", [False, True], ids=["linear", "capped"])
def test_chunks_equal_the_whole_forward_and_gradient(rows: int | None, capped: bool) -> None:
    hidden, targets, linear = parts()
    head = nn.Sequential(linear, nn.Tanh()) if capped else linear
    found, slopes = [], []
    for loss in (lambda h: plain(h, targets, head), lambda h: frozen_head_loss(h, targets, head, V, rows=rows)):
        leaf = hidden.clone().requires_grad_()
        total = loss(leaf * 2)
        (total * 0.25).backward()
        found.append(total.detach())
        slopes.append(leaf.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-6)
    assert slopes[0].abs().min() > 0


def test_no_more_logits_at_once_than_the_chunk() -> None:
    hidden, targets, linear = parts()
    seen: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return linear(x)

    frozen_head_loss(hidden.requires_grad_(), targets, head, V, rows=5)
    assert seen == [5, 5, 5, 5, 3]
    frozen_head_loss(hidden[:3], targets[:3], head, CHUNK_ELEMENTS // 2)
    assert seen[5:] == [2, 1]


def test_the_head_takes_no_gradient_and_nothing_is_kept_without_one() -> None:
    hidden, targets, head = parts()
    head.requires_grad_()
    frozen_head_loss(hidden.requires_grad_(), targets, head, V).backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not frozen_head_loss(hidden, targets, head, V).requires_grad
    assert not frozen_head_loss(hidden.detach(), targets, head, V).requires_grad


def test_in_bfloat16_sums_are_float32() -> None:
    hidden, targets, head = parts(torch.bfloat16)
    leaf = hidden.requires_grad_()
    total = frozen_head_loss(leaf, targets, head, V, rows=4)
    total.backward()
    assert total.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(total, plain(hidden, targets, head), rtol=1e-5, atol=1e-4)


def test_operations_can_be_counted() -> None:
    hidden, targets, head = parts()
    with FlopCounterMode(display=False) as counter:
        frozen_head_loss(hidden.requires_grad_(), targets, head, V, rows=5).backward()
    assert counter.get_total_flops() == 2 * 2 * K * M * V  # logits, and the slope of the hidden states
