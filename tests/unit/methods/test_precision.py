"""What stays in float32 when the rest computes in bfloat16: losses, softmax, the norm on the image tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from isthmus.config import CompressionConfig
from isthmus.methods import METHODS
from isthmus.methods.co_optimise_config import AttentionConfig
from isthmus.methods.parts import VisionNorm
from isthmus.models.attention import CrossAttention, ImageTokens
from method_cases import batch, build, recipe, samples


@pytest.mark.parametrize("method", sorted(METHODS))
def test_autocast_losses_stay_close_and_in_float32(method: str, tmp_path: Path) -> None:
    # Among tokens of nearly equal scores rounding chooses another one, and the loss jumps: here all of them stay.
    # And an attention that starts at zero says zero in any precision.
    changes: dict[str, dict[str, Any]] = {
        "guided": {"compression": CompressionConfig(layers=(0, 1), keep=(1.0,))},
        "co_optimise": {"attention": AttentionConfig(heads=4, zero_init=False)},
    }
    stage = build(recipe(method, tmp_path, **changes.get(method, {})))
    made = batch(stage, samples(stage, 8))
    exact = stage.module(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = stage.module(made)
    assert half.total.dtype == torch.float32
    for name, value in exact.parts.items():
        assert half.parts[name].dtype == torch.float32
        assert float(half.parts[name]) == pytest.approx(float(value), abs=2e-2), name
        assert float(half.parts[name]) != float(value), "autocast did nothing"
    half.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in stage.module.parameters() if p.requires_grad)


def test_the_norm_of_image_tokens_is_taken_in_float32_under_autocast() -> None:
    x_BND = torch.randn(2, 3, 64).bfloat16() * 50 + 1000  # bfloat16 statistics of such values are visibly off
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = VisionNorm(64)(x_BND, torch.bfloat16).tokens_BND
    assert torch.equal(found, F.layer_norm(x_BND.float(), (64,), eps=1e-5).bfloat16())


def test_the_direct_cross_attention_s_softmax_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda self, *a, **k: seen.append((out := softmax(self, *a, **k)).dtype) or out
    )
    cross = CrossAttention(32, 48, 4, 0.0, 1e-12).bfloat16()
    cross(torch.randn(2, 4, 32).bfloat16(), ImageTokens(torch.randn(2, 9, 48).bfloat16()), None)
    assert seen == [torch.float32]
