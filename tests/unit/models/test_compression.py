"""Dropping image tokens: how many, which, in what order, and that nothing changes where nothing is dropped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from isthmus.config import CompressionConfig, VisionConfig
from isthmus.errors import ConfigError
from isthmus.models.compressible import Guide, attend_and_score, new_transformer, upper_transformer
from isthmus.models.compression import (
    FUSED,
    attention_score,
    compress,
    distribution,
    mixed_score,
    overlap,
    progress,
    schedule,
)
from isthmus.models.vision import build_vision, describe_vision, whole_model

WIDTH, TOKENS = 32, 10


def tower(class_token: bool = True, seed: int = 0, **changes: Any) -> Any:
    config = CompressionConfig(**{"layers": (1, 2), "keep": (0.6,), **changes})
    torch.manual_seed(seed)
    made = new_transformer(
        config, 12, TOKENS, layers=4, width=WIDTH, heads=4, feed_forward=64, class_token=class_token, dropout=0.0
    )
    with torch.no_grad():  # wide enough that scores differ clearly
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made.eval()


@pytest.mark.parametrize(("tokens", "expected"), [(196, [139, 99, 71]), (256, [181, 128, 91]), (576, [405, 285, 201])])
def test_evit_s_counts(tokens: int, expected: list[int]) -> None:
    steps = schedule(CompressionConfig(preset="evit"), tokens)
    assert [step.layer for step in steps] == [3, 6, 9] and [step.left for step in steps] == expected


def test_elip_s_shares_are_of_the_image() -> None:
    steps = schedule(CompressionConfig(preset="elip"), 256)
    assert [(s.layer, s.kept) for s in steps] == [(2, 231), (4, 167), (10, 103)]
    assert [s.left for s in steps] == [232, 168, 104]


def test_a_product_that_is_whole_is_not_rounded_up() -> None:
    for tenths, tokens in itertools.product(range(1, 10), range(10, 400, 10)):
        [step] = schedule(CompressionConfig(layers=(0,), keep=(tenths / 10,)), tokens)
        assert step.kept == tenths * tokens // 10


def test_the_rate_waits_and_then_falls_along_a_cosine() -> None:
    config = CompressionConfig(layers=(0,), keep=(0.5,), warmup_steps=10, shrink_steps=20)
    assert [progress(config, step) for step in (0, 9, 10)] == [0.0, 0.0, 0.0]
    assert progress(config, 20) == pytest.approx(0.5) and progress(config, 30) == progress(config, 99) == 1.0
    counts = [schedule(config, 100, progress(config, step))[0].kept for step in range(40)]
    assert counts[0] == 100 and counts[-1] == 50 and counts == sorted(counts, reverse=True)
    assert schedule(config, 100, 0.0)[0].left == 100, "nothing is fused where nothing is dropped"


def test_bad_settings_are_named() -> None:
    for values, said in (
        ({"layers": (3, 3)}, "not ascending"),
        ({"layers": (1, 2, 3), "keep": (0.5, 0.4)}, "2 values for 3 layers"),
        ({"layers": (1, 2), "keep": (0.4, 0.5), "keep_of": "image"}, "must not rise"),
        ({"layers": (1,), "look_ahead": (2,)}, "place: before"),
    ):
        with pytest.raises(ValidationError, match=said):
            CompressionConfig(**values)
    assert CompressionConfig(preset="evit", keep=(0.5,)).keep == (0.5,), "what is given beside a preset counts"
    with pytest.raises(ConfigError, match="layer 4, and the trained transformer has 4"):
        tower(layers=(4,))


# ------------------------------------------------------------------------------------------------ what stays


def test_the_highest_scores_stay_in_their_old_order_and_the_rest_is_their_weighted_mean() -> None:
    x = torch.randn(1, 5, 3)
    scores = torch.tensor([[0.1, 0.3, 0.05, 0.4, 0.15]])  # the later one scores higher
    out, places = compress(x, scores, 2)
    assert places.tolist() == [[1, 3, FUSED]] and torch.equal(out[:, :2], x[:, [1, 3]])
    torch.testing.assert_close(out[:, 2], (0.1 * x[:, 0] + 0.05 * x[:, 2] + 0.15 * x[:, 4]) / 0.3)
    bare, places = compress(x, scores, 2, fuse=False)
    assert torch.equal(bare, out[:, :2]) and places.tolist() == [[1, 3]]
    assert compress(x, scores, 5)[0] is x


def test_identical_tokens_are_fused_into_that_token() -> None:
    x = torch.randn(2, 1, 8).expand(2, 6, 8)
    out, _ = compress(x, torch.rand(2, 6), 2)
    torch.testing.assert_close(out, x[:, :3], rtol=0, atol=1e-6)
    out, _ = compress(x, torch.zeros(2, 6), 2)  # no score at all: a plain mean, not a division by nothing
    torch.testing.assert_close(out, x[:, :3], rtol=0, atol=1e-6)


def test_gradients_flow_through_the_fused_token_s_weights_unless_detached() -> None:
    for detach in (False, True):
        x, scores = torch.randn(1, 6, 4), torch.rand(1, 6, requires_grad=True)
        out = compress(x.requires_grad_(), scores, 3, detach=detach)[0]
        out[:, -1].sum().backward()
        assert (scores.grad is None) == detach


def test_permuting_patches_permutes_the_selection() -> None:
    module, x = tower(), torch.randn(3, 1 + TOKENS, WIDTH)
    order = torch.randperm(TOKENS)
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, order]], 1)  # positions are in the trunk already, so they move along
    plain, other = (module.finish(trunk, module.schedule()) for trunk in (x, shuffled))
    for row in range(3):
        chosen = [order[n].item() for n in other.numbers_BN[row].tolist() if n != FUSED]
        assert sorted(chosen) == sorted(n for n in plain.numbers_BN[row].tolist() if n != FUSED)
    torch.testing.assert_close(plain.tokens_BSC[:, 0], other.tokens_BSC[:, 0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- transformer


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_medium_patch16_gap_256"]
)
@pytest.mark.parametrize("frozen", [0, 5])
def test_at_a_rate_of_one_it_is_timm_s_transformer_bit_for_bit(name: str, frozen: int) -> None:
    """Class token, registers, none of both; frozen below the first block, and half of the way up."""
    vision = VisionConfig(name=name, weights="random", image_size=28 * 4, options={"depth": 12}, layer=frozen - 13)
    spec, model = describe_vision(vision), whole_model(vision).eval()
    trunk, pixels = build_vision(vision), torch.randn(2, 3, 112, 112)
    config = CompressionConfig(layers=(1, 3), keep=(1.0,))
    module = upper_transformer(config, whole_model(vision), vision.layer, spec.tokens).eval()
    with torch.no_grad():
        assert torch.equal(module(trunk(pixels)).tokens_BSC, model.forward_features(pixels))
        shorter = CompressionConfig(layers=(1, 3), keep=(0.7,))
        module = upper_transformer(shorter, whole_model(vision), vision.layer, spec.tokens).eval()
        seen = module(trunk(pixels))
    assert seen.tokens_BSC.shape[1] == model.num_prefix_tokens + module.schedule()[-1].left


def test_attention_that_is_read_is_the_block_s_own() -> None:
    model = whole_model(VisionConfig(name="vit_tiny_patch16_224", weights="random", image_size=32)).eval()
    x, block = torch.randn(2, 5, 192), model.blocks[3]
    with torch.no_grad():
        seen, image_BN, _ = attend_and_score(block, x, 1, True, None)
        assert torch.equal(seen, block.attn(block.norm1(x)))
        query, key, _ = block.attn.qkv(block.norm1(x)).reshape(2, 5, 3, 3, 64).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / 8).softmax(-1)
    torch.testing.assert_close(image_BN, weights[:, :, 0, 1:].mean(1))
    bare = attend_and_score(block, x, 0, False, None)[1]  # no class token: what all tokens look at
    torch.testing.assert_close(bare, weights.mean((1, 2)))
    registers = attend_and_score(block, x, 2, False, None)[1]  # two that neither ask nor are asked for
    torch.testing.assert_close(registers, weights[:, :, 2:, 2:].mean((1, 2)))


def test_registers_are_no_class_token() -> None:
    vision = VisionConfig(name="vit_medium_patch16_reg4_gap_256", weights="random", image_size=64, options={"depth": 3})
    spec, config = describe_vision(vision), CompressionConfig(layers=(0,), keep=(0.5,))
    assert (spec.prefix, spec.class_token, spec.tokens) == (4, False, 20)
    module = upper_transformer(config, whole_model(vision), -4, spec.tokens).eval()
    with torch.no_grad():
        seen = module(torch.randn(2, 20, 512))
    assert seen.tokens_BSC.shape[1] == 4 + 8 + 1
    assert torch.equal(seen.pooled, seen.tokens_BSC[:, 4:].mean(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "elip", "balance": 1.0}, "balance has no say"),
        ({"preset": "evit", "class_mix": 0.0}, "class_mix is of look_ahead"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CompressionConfig(**options)


def test_what_cannot_be_compressed_is_refused() -> None:
    config = CompressionConfig(layers=(1,))
    with pytest.raises(ConfigError, match="no plain vision transformer"):
        upper_transformer(config, whole_model(VisionConfig(weights="random", image_size=64)), -2, 4)
    tiny = VisionConfig(name="vit_tiny_patch16_224", weights="random", image_size=32)
    with pytest.raises(ConfigError, match="no layer is left"):
        upper_transformer(config, whole_model(tiny), -1, 5)
    with pytest.raises(ConfigError, match="class token"):
        tower(class_token=False, preset="elip", layers=(1, 2), keep=(0.6,), look_ahead=(1,))


# --------------------------------------------------------------------------------------------------- guidance


def planted(module: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A trunk in which one patch is of no interest to the class token, and a text whose query is that patch's key."""
    torch.manual_seed(3)
    x = torch.randn(1, 1 + TOKENS, WIDTH)
    block = module.blocks[1]
    with torch.no_grad():
        scores = attend_and_score(block, x, 1, True, None)[1][0]
        worst = int(scores.argmin())
        x[:, [1 + worst, 1 + number]] = x[:, [1 + number, 1 + worst]]
        key = block.attn.qkv(block.norm1(x))[0, 1 + number, WIDTH : 2 * WIDTH]
        weight = block.attn.qkv.weight[:WIDTH]  # q = W y + b, so that y is the key's image under the pseudo-inverse
        wanted = torch.linalg.lstsq(weight, (8.0 * key - block.attn.qkv.bias[:WIDTH]).unsqueeze(1)).solution.squeeze(1)
    return x, wanted.unsqueeze(0)


class Straight(nn.Module):
    """A norm that lets everything pass, so that a wanted query can be planted."""

    normalized_shape = (WIDTH,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("number", [0, 4, 9])
def test_a_patch_that_the_text_is_about_stays_only_with_guidance(number: int) -> None:
    module = tower(layers=(1,), keep=(0.5,))
    module.blocks[1].norm1 = Straight()
    x, text = planted(module, number)
    with torch.no_grad():
        plain = module.finish(x, module.schedule())
        guided = module.finish(x, module.schedule(), Guide(text))
        other = module.finish(x, module.schedule(), Guide(-text))
        left_out = module.finish(x, module.schedule(), Guide(text, torch.tensor([False])))
    assert number not in plain.numbers_BN[0].tolist() and number in guided.numbers_BN[0].tolist()
    assert number not in other.numbers_BN[0].tolist(), "an opposite text does not want it"
    assert torch.equal(left_out.tokens_BSC, plain.tokens_BSC), "a row without guidance is the unguided one"
    assert guided.tokens_BSC.shape == plain.tokens_BSC.shape


def test_a_balance_of_one_is_no_guidance() -> None:
    module, x = tower(balance=1.0), torch.randn(2, 1 + TOKENS, WIDTH)
    with torch.no_grad():
        plain = module.finish(x, module.schedule())
        guided = module.finish(x, module.schedule(), Guide(torch.randn(2, WIDTH) * 5))
    assert torch.equal(plain.tokens_BSC, guided.tokens_BSC)


@pytest.mark.parametrize("changes", [{}, {"preset": "trips"}, {"preset": "elip", "look_ahead": (1, 2)}])
def test_every_preset_runs_guided_and_unguided_and_differs(changes: dict[str, Any]) -> None:
    module = tower(**{**changes, "layers": (0, 2), "keep": (0.6, 0.4) if changes else (0.5,)})
    x, text = torch.randn(4, TOKENS, 12), torch.randn(4, WIDTH) * 5
    with torch.no_grad():
        plain, guided = module(x), module(x, Guide(text))
    assert plain.tokens_BSC.shape == guided.tokens_BSC.shape
    assert plain.patches.shape[1] == module.schedule()[-1].left
    assert not torch.allclose(plain.tokens_BSC, guided.tokens_BSC, atol=1e-4)
    assert torch.equal(plain.tokens_BSC, module(x).tokens_BSC)


def test_scores_are_distributions_and_overlap_counts_own_tokens() -> None:
    query, key = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(attention_score(query, key).sum(1), torch.ones(2))
    image, text = torch.rand(2, 7), torch.rand(2, 7)
    mixed = mixed_score(image, text, None, 0.25)
    torch.testing.assert_close(mixed, 0.25 * distribution(image) + 0.75 * distribution(text))
    one, other = torch.tensor([[0, 3, 5, FUSED]]), torch.tensor([[3, 5, 6, FUSED]])
    assert overlap(one, other).tolist() == pytest.approx([2 / 3])
