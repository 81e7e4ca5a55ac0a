"""Cross-attention between modalities: each pattern against plain softmax attention; padding changes nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from isthmus.models.crossmodal import CrossModal, Pattern, attend_across
from isthmus.models.favor import favor_attention, orthogonal_directions

B, H, S, K, D = 3, 2, 6, 9, 8
PATTERNS = {
    "full": Pattern(),
    "top_k": Pattern("top_k", top_k=3),
    "banded": Pattern("banded", band=2),
    "favor": Pattern("favor", features=64),
}


def heads(rows: int, seed: int) -> Tensor:
    return torch.randn(B, H, rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(rows: int) -> Tensor:
    return torch.ones(B, rows, dtype=torch.bool)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / math.sqrt(D)).softmax(-1) @ value


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern("top_k", top_k=K), Pattern("top_k", top_k=50), Pattern("banded", band=K)]
)
def test_a_pattern_that_leaves_nothing_out_is_full_attention(pattern: Pattern) -> None:
    query, key, value = heads(S, 0), heads(K, 1), heads(K, 2)
    seen = attend_across(query, key, value, whole(S), whole(K), pattern)
    torch.testing.assert_close(seen, plain(query, key, value))


def test_top_k_looks_at_the_best_keys_alone() -> None:
    query, key, value = heads(S, 0), heads(K, 1), heads(K, 2)
    scores = query @ key.mT / math.sqrt(D)
    best = scores.topk(3, dim=-1)
    expected = torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(-1)) @ value
    torch.testing.assert_close(attend_across(query, key, value, whole(S), whole(K), PATTERNS["top_k"]), expected)


def test_a_band_is_centred_on_the_querys_place_in_time() -> None:
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 8, 2)
    seen = attend_across(query, key, torch.eye(8)[None, None], *(torch.ones(1, n, dtype=torch.bool) for n in (4, 8)),
                         Pattern("banded", band=1))  # fmt: skip
    # Query i of 4 stands between keys 2 i and 2 i + 1 of 8.
    expected = torch.block_diag(*[torch.full((1, 2), 0.5)] * 4)
    torch.testing.assert_close(seen[0, 0], expected)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_padding_and_what_it_holds_change_nothing(name: str) -> None:
    query, key, value = heads(S, 0), heads(K, 1), heads(K, 2)
    pattern = PATTERNS[name]
    short = attend_across(query[:, :, :4], key[:, :, :5], value[:, :, :5], whole(4), whole(5), pattern)
    asks, asked = whole(S), whole(K)
    asks[:, 4:], asked[:, 5:] = False, False
    for junk in (0.0, 50.0):
        padded = [x.clone() for x in (query, key, value)]
        padded[0][:, :, 4:], padded[1][:, :, 5:], padded[2][:, :, 5:] = junk, junk, junk
        seen = attend_across(*padded, asks, asked, pattern)
        assert torch.isfinite(seen).all()
        torch.testing.assert_close(seen[:, :, :4], short, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_pair_without_keys_sees_nothing_and_has_finite_gradients(name: str) -> None:
    query, key, value = (x.requires_grad_() for x in (heads(S, 0), heads(K, 1), heads(K, 2)))
    asked = whole(K)
    asked[1] = False
    seen = attend_across(query, key, value, whole(S), asked, PATTERNS[name])
    assert not seen[1].any() and seen[0].any()
    seen.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


def test_favor_is_computed_in_float32_whatever_autocast_says() -> None:
    query, key, value = heads(S, 0), heads(K, 1), heads(K, 2)
    drawn = orthogonal_directions(64, D, 0)
    plain_BHSd = favor_attention(query, key, value, whole(K), drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(favor_attention(query, key, value, whole(K), drawn), plain_BHSd)


def test_favors_error_falls_as_one_over_the_root_of_its_features() -> None:
    query, key, value = heads(S, 0) / 2, heads(K, 1) / 2, heads(K, 2)  # long ones need far more features
    exact = plain(query, key, value)

    def error(features: int) -> float:
        """Root mean square over 40 draws."""
        gaps = [
            favor_attention(query, key, value, whole(K), orthogonal_directions(features, D, seed)) - exact
            for seed in range(40)
        ]
        return float(torch.stack(gaps).square().mean().sqrt())

    errors = [error(features) for features in (64, 256, 1024)]
    for wide, narrow in itertools.pairwise(errors):  # measured: 1.9 and 2.0
        assert 1.6 < wide / narrow < 2.5, errors
    assert errors[-1] < 0.1 * float(exact.std())


def test_favors_kernel_is_unbiased_and_its_directions_are_orthogonal_and_seeded() -> None:
    directions = orthogonal_directions(24, D, 3)
    units = torch.nn.functional.normalize(directions, dim=1)
    for start in range(0, 24, D):
        torch.testing.assert_close(units[start : start + D] @ units[start : start + D].T, torch.eye(D).double())
    assert torch.equal(directions, orthogonal_directions(24, D, 3)) and directions[0, 0] != directions[D, 0]
    assert not torch.equal(directions, orthogonal_directions(24, D, 4))
    many = orthogonal_directions(80_000, D, 0)
    assert float(many.square().mean()) == pytest.approx(1.0, abs=0.02)  # as of normal vectors
    q, k = (heads(1, seed)[0, 0, 0] * 0.5 for seed in (5, 6))
    features = [(many @ x - x.square().sum() / 2).exp() for x in (q, k)]
    assert float((features[0] * features[1]).mean()) == pytest.approx(float((q @ k).exp()), rel=0.05)


def test_without_projections_it_is_the_written_formula() -> None:
    x, y = torch.randn(2, 5, D), torch.randn(2, 7, D)
    masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    attention = CrossModal(D, 8, Pattern(), projections=False, zero_init=False)
    assert not list(attention.parameters())
    expected = (x @ y.mT / math.sqrt(D)).softmax(-1) @ y
    torch.testing.assert_close(attention(x, masks[0], y, masks[1]), expected)


def test_an_output_map_of_zeros_says_nothing_and_can_wake() -> None:
    x, y = torch.randn(2, 5, D), torch.randn(2, 7, D)
    masks = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    attention = CrossModal(D, 2, Pattern(), projections=True, zero_init=True)
    seen = attention(x, masks[0], y, masks[1])
    assert not seen.any()
    (seen - x).square().sum().backward()
    assert attention.output.weight.grad.any()
