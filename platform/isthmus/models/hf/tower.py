"""The image encoder: a timm vision transformer as transformers' ``Blip2VisionModel``, and back.

That class is one shape of network: class token, learned absolute positions, pre-norm blocks with exact GELU, and one
closing norm, which holds ``ln_vision``. A tower that is anything more is refused by name.

Shape letters: N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config import VisionConfig
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.vision import VisionEncoder

ensure_torchvision()
from timm.layers import Attention, LayerScale, Mlp  # noqa: E402
from timm.models.eva import Eva, EvaAttention, EvaBlock  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

_BLOCK = (
    ("norm1", "layer_norm1"), ("attn.qkv", "self_attn.qkv"), ("attn.proj", "self_attn.projection"),
    ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
)  # fmt: skip
_STEM = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_ARCHITECTURES = (
    (_CLIP, "vit_giant_patch14_clip_224", "vit_base_patch16_clip_224", 1e-5),
    (((0.5,) * 3, (0.5,) * 3), "vit_giant_patch14_224", "vit_base_patch16_224", 1e-6),
    (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "", "vit_base_patch16_224.dino", 1e-6),
)
"""(mean, std) of the pixels, timm's names whose data configuration has them, and those names' own norm epsilon."""


@dataclass(frozen=True)
class Tower:
    """An image encoder in transformers' terms.

    Attributes:
        config: arguments of ``Blip2VisionConfig``.
        state: tensors under ``Blip2VisionModel``'s names, without ``post_layernorm``.
        unused: tensors of blocks behind the one whose output is taken, by their timm names; they do not go along.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    unused: tuple[str, ...] = ()


def tower_names(depth: int) -> dict[str, str]:
    """timm's name -> transformers', below ``vision_model.``."""
    names = dict(_STEM)
    for i in range(depth):
        for ours, theirs in _BLOCK:
            for part in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{part}"] = f"encoder.layers.{i}.{theirs}.{part}"
    return names


# --- out -------------------------------------------------------------------------------------------------------------


def export_tower(encoder: VisionEncoder, config: VisionConfig) -> Tower:
    """The encoder up to the block that the recipe takes, LayerScale folded into the linear maps before it.

    Raises:
        ConfigError: the encoder is no such network, with every reason.
    """
    model: Any = encoder.model
    if reasons := _reasons(model, config):
        raise ConfigError(
            f"The image encoder '{config.name}' cannot be exported to Hugging Face, whose Blip2VisionModel is a plain "
            f"vision transformer: {'; '.join(reasons)}.",
            "Train on a plain ViT (class token, learned positions, exact GELU), with method.vision.final_norm: false.",
        )
    depth = len(model.blocks) + 1 + config.layer
    state = _stem_state(model)
    for i, block in enumerate(model.blocks[:depth]):
        state |= {f"encoder.layers.{i}.{name}": tensor for name, tensor in _block_state(block).items()}
    first = model.blocks[0]
    facts = {
        "hidden_size": int(model.embed_dim),
        "intermediate_size": int(first.mlp.fc1.out_features),
        "num_hidden_layers": depth,
        "num_attention_heads": int(first.attn.num_heads),
        "image_size": encoder.image_size,
        "patch_size": int(model.patch_embed.patch_size[0]),
        "hidden_act": "gelu",
        "layer_norm_eps": float(first.norm1.eps),
        "qkv_bias": "encoder.layers.0.self_attn.qkv.bias" in state,
    }
    unused = tuple(
        name for name in model.state_dict() if name.startswith("blocks.") and int(name.split(".")[1]) >= depth
    )
    return Tower(facts, state, unused)


def _stem_state(model: Any) -> dict[str, Tensor]:
    positions_1ND = model.pos_embed
    if model.no_embed_class:  # then the class token takes no position: a row of zeros
        positions_1ND = torch.cat([torch.zeros_like(positions_1ND[:, :1]), positions_1ND], 1)
    projection = model.patch_embed.proj
    return {
        "embeddings.class_embedding": model.cls_token.detach(),
        "embeddings.position_embedding": positions_1ND.detach(),
        "embeddings.patch_embedding.weight": projection.weight.detach(),
        "embeddings.patch_embedding.bias": _bias(projection),
    }


def _block_state(block: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for ours, theirs in _BLOCK:
        part = block.get_submodule(ours)
        out[f"{theirs}.weight"] = part.weight.detach()
        if ours != "attn.qkv":
            out[f"{theirs}.bias"] = _bias(part)
    if (bias := _qkv_bias(block.attn)) is not None:
        out["self_attn.qkv.bias"] = bias
    for scale, theirs in ((_scale(block, 1), "self_attn.projection"), (_scale(block, 2), "mlp.fc2")):
        if scale is not None:  # diag(scale) (W x + b), the product rounded once
            weight, bias = out[f"{theirs}.weight"], out[f"{theirs}.bias"]
            out[f"{theirs}.weight"] = (weight.double() * scale.double().unsqueeze(1)).to(weight.dtype)
            out[f"{theirs}.bias"] = (bias.double() * scale.double()).to(bias.dtype)
    return out


def _bias(part: Any) -> Tensor:
    return part.bias.detach() if part.bias is not None else part.weight.new_zeros(part.weight.shape[0])


def _qkv_bias(attention: Any) -> Tensor | None:
    if isinstance(attention, EvaAttention):  # EVA's keys have no bias
        if attention.q_bias is None:
            return None
        return torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias]).detach()
    return attention.qkv.bias.detach() if attention.qkv.bias is not None else None


def _scale(block: Any, which: int) -> Tensor | None:
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{which}")
        return gamma.detach() if gamma is not None else None
    part = getattr(block, f"ls{which}")
    return part.gamma.detach() if isinstance(part, LayerScale) else None


def _reasons(model: Any, config: VisionConfig) -> list[str]:
    """Why a tower has no equal in transformers; empty when it has."""
    if type(model) not in (VisionTransformer, Eva):
        return [f"it is a {type(model).__name__}"]
    found = []
    if model.cls_token is None:
        found.append("it has no class token")
    if getattr(model, "reg_token", None) is not None:
        found.append("it has register tokens")
    if model.pos_embed is None:
        found.append("it has no learned positions")
    if getattr(model, "rope", None) is not None:
        found.append("it has rotary positions")
    if not isinstance(model.norm_pre, nn.Identity):
        found.append("it normalises before the first block (CLIP's ln_pre)")
    if config.final_norm and not isinstance(model.norm, nn.Identity):
        found.append("its own final norm runs before ln_vision, and there is a place for one of the two")
    if config.pool != "none":
        found.append("the recipe averages its tokens")
    embed = model.patch_embed
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or not isinstance(embed.norm, nn.Identity):
        found.append("its patches are embedded by more than one convolution")
    elif len(set(embed.patch_size)) > 1 or len(set(embed.grid_size)) > 1:
        found.append("its patches or its image are not square")
    blocks = list(model.blocks)
    if {type(block) for block in blocks} - {Block, EvaBlock}:
        return [*found, f"its blocks are {type(blocks[0]).__name__}s"]
    return found + sorted({reason for block in blocks for reason in _block_reasons(block)}) + _norm_reasons(blocks)


def _block_reasons(block: Any) -> list[str]:
    found, attention, mlp = [], block.attn, block.mlp
    if type(attention) not in (Attention, EvaAttention) or getattr(attention, "qkv", None) is None:
        return [f"its attention is {type(attention).__name__} or not of one fused projection"]
    if any(not isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm)):
        found.append("it normalises queries and keys")
    if not isinstance(attention.norm, nn.Identity):
        found.append("it normalises inside the attention")
    if attention.gate is not None:
        found.append("its attention is gated")
    if attention.qkv.out_features != 3 * attention.qkv.in_features:
        found.append("its heads are not as wide as the width divided among them")
    if type(mlp) is not Mlp:
        found.append(f"its feed-forward network is a {type(mlp).__name__}")
    else:
        if not isinstance(mlp.norm, nn.Identity):
            found.append("it normalises inside the feed-forward network")
        if not (type(mlp.act).__name__ == "GELU" and getattr(mlp.act, "approximate", "none") == "none"):
            found.append(f"its activation is {type(mlp.act).__name__} and not the exact GELU")
    return found


def _norm_reasons(blocks: list[Any]) -> list[str]:
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None for norm in norms):
        return ["its norms are no layer norms with weight and bias"]
    return ["its norms differ in epsilon"] if len({norm.eps for norm in norms}) > 1 else []


# --- in --------------------------------------------------------------------------------------------------------------


def import_tower(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = _CLIP,
) -> tuple[VisionConfig, dict[str, Tensor]]:
    """A timm architecture with options that is this network, and the tensors under its names, unchanged.

    Args:
        config: of ``Blip2VisionConfig``.
        state: tensors under ``Blip2VisionModel``'s names, without ``post_layernorm``.
        pixels: mean and standard deviation of the pixels that the tower was trained on.

    Returns:
        the recipe's section, with ``weights`` still to be filled in, and the state.

    Raises:
        ConfigError: an activation, an epsilon or a normalisation of pixels that no timm name has.
        WeightsError: a tensor without a place, or a place without a tensor.
    """
    width, heads, depth = (config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    patch, size = _side(config, "patch_size"), _side(config, "image_size")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"The image tower's activation is {config['hidden_act']}.", "Only the exact GELU is known.")
    names = tower_names(depth)
    biased = bool(config.get("qkv_bias", True))
    if not biased:
        names = {ours: theirs for ours, theirs in names.items() if not theirs.endswith("qkv.bias")}
    missing, surplus = sorted(set(names.values()) - set(state)), sorted(set(state) - set(names.values()))
    if missing or surplus:
        raise WeightsError(
            f"The image tower lacks {len(missing)} tensors ({', '.join(missing) or 'none'}) and holds {len(surplus)} "
            f"that have no place ({', '.join(surplus) or 'none'}).",
            "It must be a Blip2VisionModel.",
        )
    name, options = _architecture(pixels, width, patch, float(config.get("layer_norm_eps", 1e-6)))
    options |= {
        "embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch, "qkv_bias": biased,
        "mlp_ratio": inner_ratio(int(config["intermediate_size"]), width), "final_norm": False,
    }  # fmt: skip
    section = VisionConfig(name=name, weights="random", options=options, image_size=size, layer=-1, final_norm=False)
    return section, {ours: state[theirs] for ours, theirs in names.items()}


def _side(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    sides = {int(value)} if isinstance(value, (int, float)) else {int(side) for side in value}
    if len(sides) > 1:
        raise ConfigError(f"The image tower's {key} is {value}, and only squares are known.")
    return sides.pop()


def _architecture(
    pixels: tuple[tuple[float, ...], tuple[float, ...]], width: int, patch: int, eps: float
) -> tuple[str, dict[str, bool | int | float | str]]:
    options: dict[str, bool | int | float | str] = {}
    for known, giant, base, own_eps in _ARCHITECTURES:
        if all(abs(a - b) < 1e-6 for x, y in zip(known, pixels, strict=True) for a, b in zip(x, y, strict=True)):
            if known == _CLIP:
                options["pre_norm"] = False
            if eps != own_eps:
                if eps != 1e-6:
                    break
                options["norm_layer"] = "layernorm"  # timm's own, with 1e-6
            return (giant if giant and (width, patch) == (1408, 14) else base), options
    raise ConfigError(
        f"No timm architecture normalises pixels by mean {pixels[0]} and std {pixels[1]} and has norms of epsilon "
        f"{eps:g}.",
        "Known are the pixels of CLIP (epsilon 1e-5 or 1e-6), of 0.5 and of ImageNet (1e-6).",
    )


def inner_ratio(inner: int, width: int) -> float:
    """The ratio that timm multiplies and cuts to exactly ``inner``."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width
