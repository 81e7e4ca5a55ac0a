"""The same numbers on an accelerator as on a processor. Skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isthmus.contracts import Batch, Stage
from isthmus.losses.language import frozen_head_loss
from isthmus.methods import METHODS
from isthmus.models.attention import CrossAttention, ImageTokens
from method_cases import batch, build, recipe, samples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def both(method: str, folder: Path) -> tuple[Stage, torch.nn.Module, Batch]:
    """A stage, its copy on the accelerator, and a batch with padding."""
    stage = build(recipe(method, folder))
    return stage, copy.deepcopy(stage.module).to(DEVICE), batch(stage, samples(stage, 8), padding=1)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses_and_gradients(method: str, tmp_path: Path) -> None:
    stage, moved, made = both(method, tmp_path)
    here, there = stage.module(made), moved(made.to(DEVICE))
    for name, value in here.parts.items():
        assert float(there.parts[name]) == pytest.approx(float(value), abs=1e-5), name
    here.total.backward()
    there.total.backward()
    found = dict(moved.named_parameters())
    for name, parameter in stage.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad.cpu(), parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_bf16_stays_close_and_keeps_float32_gradients(method: str, tmp_path: Path) -> None:
    stage, moved, made = both(method, tmp_path)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        half = moved(made.to(DEVICE))
    for name, value in stage.module(made).parts.items():
        assert half.parts[name].dtype == torch.float32
        assert float(half.parts[name]) == pytest.approx(float(value), abs=2e-2), name
    half.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in moved.parameters() if p.requires_grad)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions(beams: int, tmp_path: Path) -> None:
    stage, moved, made = both("blip2_stage2", tmp_path)
    stage.module.eval(), moved.eval()
    features = made.features_BND
    here = stage.module.generate(features, max_new_tokens=8, num_beams=beams)
    assert moved.generate(features.to(DEVICE), max_new_tokens=8, num_beams=beams) == here


def test_the_direct_cross_attention() -> None:
    torch.manual_seed(0)
    block = CrossAttention(32, 48, 4, 0.0, 1e-12)
    moved = copy.deepcopy(block).to(DEVICE)
    x, tokens = torch.randn(3, 5, 32), torch.randn(3, 9, 48)
    outputs = [m(x.to(d), ImageTokens(tokens.to(d)), None).square() for m, d in ((block, "cpu"), (moved, DEVICE))]
    for out in outputs:
        out.sum().backward()
    torch.testing.assert_close(outputs[1].cpu(), outputs[0])
    for here, there in zip(block.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_through_a_frozen_head() -> None:
    hidden, targets = torch.randn(23, 8), torch.randint(50, (23,))
    head = torch.nn.Linear(8, 50).requires_grad_(False)
    found = []
    for device in ("cpu", DEVICE):
        leaf = hidden.clone().to(device).requires_grad_()
        total = frozen_head_loss(leaf, targets.to(device), head.to(device), 50, rows=7)
        total.backward()
        found.append((total.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(found[1], found[0])
