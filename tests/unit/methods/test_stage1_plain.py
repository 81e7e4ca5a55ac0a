"""The whole step against the same four passes written plainly on transformers' modules: losses and every gradient."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from isthmus.config import QFormerConfig
from isthmus.contracts import Batch, LocalComm
from isthmus.losses.matching import Negatives
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))
from _plain_stage1 import PlainStage1

B, N, D, T, V = 5, 7, 12, 9, 40


def ours() -> Blip2Stage1:
    torch.manual_seed(0)
    shape = QFormerConfig(layers=4, width=16, heads=4, feed_forward=24, queries=3, dropout=0.0, embed=8, init=None)
    module = Blip2Stage1(Blip2Stage1Config(qformer=shape), None, D, None, LocalComm(), 0, vocab=V, positions=20)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "temperature":
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
    return module


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 3, 5, 2, 7])
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    ids = torch.randint(1, V, (B, T), generator=generator) * mask
    features = torch.randn(B, N, D, generator=generator) * 2 + 1
    return Batch(torch.arange(B), torch.ones(B, dtype=torch.bool), features_BND=features, ids_BT=ids, mask_BT=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gather", ["detached"])  # the only one that LAVIS has
def test_the_step_is_lavis_step(attention: str, gather: str) -> None:
    module, made = ours(), batch()
    assert module.config.itc_gather == gather
    plain = PlainStage1(module, attention, text_length=12)
    negatives = Negatives(torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1, 2, 0, 4, 3]), torch.ones(B, dtype=torch.bool))
    module.mine = lambda *_, **__: negatives  # type: ignore[method-assign]
    found = []
    for terms in (module(made), plain(made, negatives)):
        module.zero_grad()
        terms.total.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        assert gradients.keys() == dict(module.named_parameters()).keys()
        found.append((terms.parts, gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    scale = max(float(g.abs().max()) for g in found[1][1].values())
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(
            gradient, found[1][1][name], rtol=1e-4, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
