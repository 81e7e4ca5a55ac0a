"""The losses of cross-attention: what each one is, and what minimising it does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from isthmus.losses.cross import agreement_rows, aligned_rows, attended_share_rows, literal_rows
from isthmus.models.crossmodal import CrossModal, Pattern

B, N, D = 3, 5, 8


def masked() -> torch.Tensor:
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, 3:] = False
    return mask


def test_the_literal_loss_is_the_squared_gap_of_fused_and_plain_tokens() -> None:
    tokens, attended, mask = torch.randn(B, N, D), torch.randn(B, N, D), masked()
    fused = tokens + attended
    expected = [float((fused[b, mask[b]] - tokens[b, mask[b]]).norm() ** 2) for b in range(B)]
    assert literal_rows(attended, mask, "sum").tolist() == pytest.approx(expected, rel=1e-5)
    assert literal_rows(attended, mask, "sum").tolist() == pytest.approx(
        [float(attended[b, mask[b]].norm() ** 2) for b in range(B)]
    )
    counts = mask.sum(1) * D
    torch.testing.assert_close(literal_rows(attended, mask, "mean"), literal_rows(attended, mask, "sum") / counts)


def test_the_aligned_loss_is_0_for_a_scaled_copy_1_for_silence_and_2_for_a_stranger() -> None:
    tokens, mask = torch.randn(400, N, 64), torch.ones(400, N, dtype=torch.bool)
    assert float(aligned_rows(tokens * 3 + 1, tokens, mask, "mean").mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(aligned_rows(tokens * 0, tokens, mask, "mean").mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(aligned_rows(torch.randn_like(tokens) * 3, tokens, mask, "mean").mean()) == pytest.approx(
        2.0, abs=0.05
    )


def test_the_aligned_loss_holds_the_token_fixed() -> None:
    tokens, attended = torch.randn(B, N, D, requires_grad=True), torch.randn(B, N, D, requires_grad=True)
    aligned_rows(attended, tokens, masked(), "mean").sum().backward()
    assert tokens.grad is None and attended.grad is not None and not attended.grad[1, 3:].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_counts_nowhere(reduction: str) -> None:
    tokens, attended, mask = torch.randn(B, N, D), torch.randn(B, N, D), masked()
    junk_tokens, junk_attended = tokens.clone(), attended.clone()
    junk_tokens[1, 3:], junk_attended[1, 3:] = 40.0, -torch.arange(D) * 9.0
    for first, second in (
        (literal_rows(attended, mask, reduction), literal_rows(junk_attended, mask, reduction)),
        (
            aligned_rows(attended, tokens, mask, reduction),
            aligned_rows(junk_attended, junk_tokens, mask, reduction),
        ),
        (agreement_rows(attended, tokens, mask), agreement_rows(junk_attended, junk_tokens, mask)),
        (attended_share_rows(attended, tokens, mask), attended_share_rows(junk_attended, junk_tokens, mask)),
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("loss", ["literal", "aligned"])
def test_the_literal_loss_switches_the_attention_off_and_the_aligned_one_does_not(loss: str) -> None:
    torch.manual_seed(0)
    latent = torch.randn(16, 4, 6)
    x, y = latent @ torch.randn(6, 12), latent @ torch.randn(6, 12)
    mask = torch.ones(16, 4, dtype=torch.bool)
    project = torch.nn.Linear(12, D), torch.nn.Linear(12, D)
    attention = CrossModal(D, 2, Pattern(), projections=True, zero_init=False)
    optimizer = torch.optim.Adam([p for m in (*project, attention) for p in m.parameters()], 1e-2)
    shares, losses = [], []
    for _ in range(250):
        tokens, other = project[0](x), project[1](y)
        seen = attention(tokens, mask, other, mask)
        rows = literal_rows(seen, mask, "mean") if loss == "literal" else aligned_rows(seen, tokens, mask, "mean")
        # The contrast keeps the pooled vectors apart, as in training; it does not mind the tokens' scale.
        pooled = [F.normalize(z.mean(1), dim=-1) for z in (tokens, other)]
        contrast = F.cross_entropy(pooled[0] @ pooled[1].T / 0.1, torch.arange(16))
        optimizer.zero_grad()
        (contrast + rows.mean()).backward()
        optimizer.step()
        shares.append(float(attended_share_rows(seen, tokens, mask).mean()))
        losses.append(float(rows.mean().detach()))
    if loss == "literal":
        assert losses[-1] < 0.05 * losses[0] and shares[-1] < 0.2 * shares[0]
    else:
        assert shares[-1] > 0.5 * shares[0] and losses[-1] < 0.6 * losses[0]
