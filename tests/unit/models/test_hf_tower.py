"""The image tower on its way to transformers' Blip2VisionModel and back, and the towers that cannot go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_cases import SIZE, Blip2VisionConfig, Blip2VisionModel, drawn, lavis_eva, own, pixels, tower
from isthmus.config import VisionConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods.interchange import export_hf
from isthmus.models.hf.foreign import read_tower
from isthmus.models.hf.tower import Tower, export_tower, import_tower, inner_ratio
from isthmus.models.vision import VisionEncoder, build_vision

EVA = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "patch_size": 8}


def theirs(found: Tower) -> nn.Module:
    """Blip2VisionModel with the tower's tensors, its closing norm taken out."""
    model = Blip2VisionModel._from_config(Blip2VisionConfig(**found.config)).eval()
    missing, surplus = model.load_state_dict(found.state, strict=False)
    assert sorted(missing) == ["post_layernorm.bias", "post_layernorm.weight"] and surplus == []
    model.post_layernorm = nn.Identity()
    return model


@pytest.mark.parametrize(
    "config",
    [
        tower(),
        tower("vit_base_patch16_224"),
        tower("vit_base_patch16_224.dino"),
        tower("vit_base_patch16_224", init_values=0.1),
        tower("vit_base_patch16_224", no_embed_class=True),
        tower("vit_base_patch16_224", qkv_bias=False),
        tower("vit_base_patch16_224", proj_bias=False),
        tower("vit_small_patch14_dinov2"),
        VisionConfig(
            name="eva_giant_patch14_224", weights="random", image_size=SIZE, layer=-1, final_norm=False, options=EVA
        ),
        VisionConfig(
            name="eva_giant_patch14_clip_224", weights="random", image_size=SIZE, final_norm=False, layer=-2,
            options={**EVA, "init_values": 0.1},
        ),
        tower("vit_base_patch16_224").model_copy(update={"layer": -3}),
        tower("vit_base_patch16_224").model_copy(update={"image_size": 48}),
    ],
    ids=lambda c: f"{c.name}-{'-'.join(k for k in c.options if k not in EVA)}{c.layer}-{c.image_size}",
)  # fmt: skip
@torch.no_grad()
def test_blip2_vision_model_is_the_tower(config: VisionConfig) -> None:
    encoder = drawn(config)
    found = export_tower(encoder, config)
    assert found.config["num_hidden_layers"] == 4 + config.layer
    assert bool(found.unused) == (config.layer != -1)
    x = torch.randn(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))
    ours, other = encoder(x), theirs(found)(pixel_values=x).last_hidden_state
    assert ours.shape == other.shape and float(ours.std()) > 0.1
    assert float((ours - other).abs().max()) <= 2e-5 * float(ours.abs().max())
    assert float((ours[0] - ours[1]).abs().max()) > 0.1 and float((ours[:, 0] - ours[:, 1]).abs().max()) > 0.1

    section, state = import_tower(found.config, found.state, (encoder.transform.mean, encoder.transform.std))
    back = build_vision(section)
    back.model.load_state_dict(state, strict=True)
    assert float((back(x) - ours).abs().max()) <= 2e-5 * float(ours.abs().max())
    assert back.transform == encoder.transform
    again = export_tower(back, section)
    assert again.config == found.config and again.state.keys() == found.state.keys()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in found.state.items())


def test_layer_scale_is_folded_into_the_maps_before_it() -> None:
    config = tower("vit_base_patch16_224", init_values=0.1)
    encoder = drawn(config)
    block, found = encoder.model.blocks[1], export_tower(encoder, config).state  # type: ignore[index, union-attr]
    gamma = block.ls2.gamma
    torch.testing.assert_close(found["encoder.layers.1.mlp.fc2.weight"], gamma[:, None] * block.mlp.fc2.weight)
    torch.testing.assert_close(found["encoder.layers.1.mlp.fc2.bias"], gamma * block.mlp.fc2.bias)
    assert not [name for name in found if "gamma" in name]


REFUSED = [
    ("vit_base_patch16_clip_quickgelu_224", {}, r"ln_pre.*activation is QuickGELU"),
    ("vit_base_patch16_clip_224", {}, "normalises before the first block"),
    ("vit_base_patch16_224", {"act_layer": "quick_gelu"}, "activation is QuickGELU"),
    ("vit_base_patch16_224", {"act_layer": "gelu_tanh"}, "activation is GELUTanh"),
    ("vit_small_patch14_reg4_dinov2", {}, "register tokens"),
    ("vit_base_patch16_siglip_224", {}, "no class token"),
    ("vit_base_patch16_224", {"qk_norm": True}, "normalises queries and keys"),
    ("vit_base_patch16_224", {"scale_attn_norm": True}, "normalises inside the attention"),
    ("vit_base_patch16_224", {"pos_embed": "none"}, "no learned positions"),
    ("eva02_tiny_patch14_224", {}, "rotary positions"),
    ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
    ("vit_relpos_small_patch16_224", {}, "VisionTransformerRelPos"),
    ("tf_efficientnet_lite0", {}, "EfficientNet"),
    ("swin_tiny_patch4_window7_224", {}, "SwinTransformer"),
]


@pytest.mark.parametrize(("name", "more", "reason"), REFUSED, ids=[f"{n}-{next(iter(m), '')}" for n, m, _ in REFUSED])
def test_towers_that_are_more_than_a_plain_vit_are_refused_by_name(
    name: str, more: dict[str, Any], reason: str
) -> None:
    plain = name.startswith(("vit_base", "vit_small_patch14"))
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8} if plain else {}
    final = not plain
    config = VisionConfig(
        name=name,
        weights="random",
        image_size=SIZE if plain else None,
        options={**sizes, **more},
        layer=-1,
        final_norm=final,
    )
    with pytest.raises(ConfigError, match=rf"(?s)'{name}'.*{reason}"):
        export_tower(build_vision(config), config)


def test_a_final_norm_and_an_average_are_refused() -> None:
    for change, reason in (({"final_norm": True}, "own final norm"), ({"pool": "mean"}, "averages its tokens")):
        config = tower("vit_base_patch16_224").model_copy(update=change)
        config = config.model_copy(update={"options": {**config.options, "final_norm": True}})
        with pytest.raises(ConfigError, match=reason):
            export_tower(build_vision(config), config)


def test_tokens_too_alike_for_the_other_epsilon_are_refused(tmp_path: Path) -> None:
    """ln_vision has 1e-5 here and the blocks' 1e-6 there: tokens of small variance would come out differently."""
    from isthmus.methods.artefact import load_artefact

    own(tmp_path / "ours", "blip2_stage1")
    recipe = load_artefact(tmp_path / "ours").recipe.method
    file = Path(recipe.vision.weights)  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    state = load_file(file)
    for name in state:
        if name.startswith(("cls_token", "pos_embed", "patch_embed")) or "attn.proj" in name or "mlp.fc2" in name:
            state[name] = state[name] * 0.005
    save_file(state, file)
    (tmp_path / "ours/bases.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"queries would differ by .* 1e-5, and the encoder's tokens vary little"):
        export_hf(tmp_path / "ours", tmp_path / "hf")
    assert export_hf(tmp_path / "ours", tmp_path / "hf", check=False, tolerance=1.0).query_difference > 1e-4


# --- other names -----------------------------------------------------------------------------------------------------


def eva_like() -> VisionEncoder:
    return drawn(tower(), key_bias=False)


@torch.no_grad()
def test_eva_of_lavis_is_read() -> None:
    encoder = eva_like()
    section, state, unused = read_tower(lavis_eva(encoder), heads=4, layer=-1)
    back = build_vision(section)
    back.model.load_state_dict(state, strict=True)
    assert torch.equal(back(pixels()), encoder(pixels())) and unused == []
    assert back.transform == encoder.transform and section.options["pre_norm"] is False
    section, _, unused = read_tower({**lavis_eva(encoder), "norm.weight": torch.ones(48)}, heads=4)
    assert section.layer == -2 and unused == ["norm.weight"]  # as LAVIS cuts it


@torch.no_grad()
def test_clip_of_openai_is_read() -> None:
    """A second way to the same tower: timm's own map of these names."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    encoder = build_vision(tower("vit_base_patch16_224"))  # for its sizes
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {
        "class_embedding": torch.randn(48, generator=generator),
        "positional_embedding": torch.randn(17, 48, generator=generator),
        "conv1.weight": torch.randn(48, 3, 8, 8, generator=generator) * 0.1,
    }
    shapes = {"ln_1": (48,), "ln_2": (48,), "attn.in_proj_": (144, 48), "attn.out_proj": (48, 48),
              "mlp.c_fc": (72, 48), "mlp.c_proj": (48, 72)}  # fmt: skip
    for i in range(3):
        for part, shape in shapes.items():
            dot = "" if part.endswith("_") else "."
            state[f"transformer.resblocks.{i}.{part}{dot}weight"] = torch.randn(shape, generator=generator) * 0.15
            state[f"transformer.resblocks.{i}.{part}{dot}bias"] = torch.randn(shape[0], generator=generator) * 0.15
    for part in ("ln_pre.weight", "ln_pre.bias"):
        state[part] = torch.randn(48, generator=generator)
    section, mine, _ = read_tower(state, heads=4, layer=-1)
    back = build_vision(section)
    back.model.load_state_dict(mine, strict=True)
    plain = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", num_classes=0, embed_dim=48, depth=3, num_heads=4, mlp_ratio=1.5,
        patch_size=8, img_size=SIZE,
    )  # fmt: skip
    visual = {f"visual.{n}": t for n, t in state.items()} | {
        "visual.ln_post.weight": torch.ones(48), "visual.ln_post.bias": torch.zeros(48),
    }  # fmt: skip
    plain.load_state_dict({n: t for n, t in checkpoint_filter_fn(visual, plain).items() if "head" not in n})
    plain.norm = nn.Identity()
    assert float((back(pixels()) - plain.eval().forward_features(pixels())).abs().max()) <= 1e-6
    assert encoder.width == back.width
    with pytest.raises(ConfigError, match="ln_pre"):
        export_tower(back, section)


def test_a_foreign_tower_that_is_not_understood_is_refused() -> None:
    state = lavis_eva(eva_like())
    with pytest.raises(WeightsError, match="--vision-heads"):
        read_tower(state)
    with pytest.raises(WeightsError, match=r"lacks 1 tensors \(blocks\.2\.norm1\.bias\)"):
        read_tower({n: t for n, t in state.items() if n != "blocks.2.norm1.bias"}, heads=4)
    with pytest.raises(WeightsError, match=r"holds 1 .*blocks\.0\.gamma_1"):
        read_tower({**state, "blocks.0.gamma_1": torch.ones(48)}, heads=4)
    with pytest.raises(WeightsError, match="v_bias"):
        read_tower({n: t for n, t in state.items() if n != "blocks.1.attn.v_bias"}, heads=4)
    with pytest.raises(WeightsError, match="neither EVA's"):
        read_tower({"weight": torch.ones(3)})


@pytest.mark.parametrize("width", [48, 384, 768, 1024, 1408, 1664])
def test_the_ratio_gives_back_the_inner_width(width: int) -> None:
    for inner in range(width, 5 * width, 7):
        assert int(width * inner_ratio(inner, width)) == inner
