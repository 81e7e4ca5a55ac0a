"""Image towers under other names: EVA's as LAVIS has it, OpenAI's CLIP's, and timm's own.

Shape letters: N image tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isthmus.config import VisionConfig
from isthmus.errors import WeightsError
from isthmus.models.hf.tower import import_tower, inner_ratio, tower_names

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads of the published towers by width: no checkpoint says them."""
LAVIS_DEPTH = {1408: 39, 1024: 23}
"""Blocks of the towers that LAVIS cut behind the second-last one, by width."""

_CLOSING = ("norm.", "fc_norm.", "head.", "ln_post.", "proj")
_CLIP_STEM = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
}
_CLIP_BLOCK = {
    "ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.in_proj_": "attn.qkv.",
}  # fmt: skip


def read_tower(
    state: Mapping[str, Tensor], *, heads: int | None = None, layer: int | None = None
) -> tuple[VisionConfig, dict[str, Tensor], list[str]]:
    """A plain or CLIP vision transformer as a section of a recipe and tensors under timm's names.

    Args:
        state: the tower's tensors. A closing norm and a classifier, which no BLIP-2 uses, may be among them.
        heads: attention heads; by default those of the published tower of this width.
        layer: which block's output is taken; by default the second last, as LAVIS does, or the last where LAVIS has cut
            the tower already.

    Returns:
        (section with ``weights`` still to be filled in, tensors, names of those that no BLIP-2 uses).

    Raises:
        WeightsError: tensors of no such tower; all without a place are listed.
        ConfigError: see :func:`isthmus.models.hf.tower.import_tower`.
    """
    closing = sorted(name for name in state if name.startswith(_CLOSING))
    state = {name: tensor for name, tensor in state.items() if name not in closing}
    clip = "class_embedding" in state
    state = _from_clip(state) if clip else _with_whole_bias(state)
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise WeightsError(
            "The image tower is neither EVA's, nor CLIP's, nor a plain ViT of timm's.",
            f"It holds: {', '.join(sorted(state)[:8])}.",
        )
    facts = _facts(state, heads)
    width, depth = facts["hidden_size"], facts["num_hidden_layers"]
    taken = layer if layer is not None else -1 if depth == LAVIS_DEPTH.get(width) else -2
    names = tower_names(depth)
    if not facts["qkv_bias"]:
        names = {ours: theirs for ours, theirs in names.items() if not ours.endswith("qkv.bias")}
    if clip:
        _check_names((set(names) - {"patch_embed.proj.bias"}) | {"norm_pre.weight", "norm_pre.bias"}, set(state))
        section = _clip_section(facts)
    else:
        _check_names(set(names), set(state))
        section, state = import_tower(facts, {names[name]: tensor for name, tensor in state.items()})
    return section.model_copy(update={"layer": taken}), dict(state), closing


def _facts(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    patch = state["patch_embed.proj.weight"]
    width, side = int(patch.shape[0]), int(patch.shape[-1])
    heads = heads or HEADS.get(width)
    if not heads or width % heads:
        raise WeightsError(
            f"The image tower is {width} wide, and no checkpoint says how many heads it has.",
            "Say it: --vision-heads.",
        )
    if "blocks.0.mlp.fc1.weight" not in state:
        raise WeightsError("The image tower has no 'blocks.0.mlp.fc1.weight'.", "The checkpoint is incomplete.")
    grid = (int(state["pos_embed"].shape[1]) - 1) ** 0.5
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        "intermediate_size": int(state["blocks.0.mlp.fc1.weight"].shape[0]),
        "patch_size": side,
        "image_size": round(grid) * side,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _with_whole_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EVA's q_bias and v_bias as one [q, 0, v]; its keys have none."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("attn.q_bias"):
            value = state.get(name.replace("q_bias", "v_bias"))
            if value is None:
                raise WeightsError(f"The image tower has '{name}' without a v_bias.", "The checkpoint is incomplete.")
            whole = torch.cat([tensor, torch.zeros_like(tensor), value])
            out[name.replace("q_bias", "qkv.bias")] = whole
        elif not (name.endswith("attn.v_bias") and name.replace("v_bias", "q_bias") in state):
            out[name] = tensor
    return out


def _from_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if found := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name):
            inner = found[2]
            for theirs, ours in _CLIP_BLOCK.items():
                if inner.startswith(theirs):
                    inner = inner.replace(theirs, ours, 1)
                    break
            out[f"blocks.{found[1]}.{inner}"] = tensor
        elif name == "class_embedding":
            out["cls_token"] = tensor.reshape(1, 1, -1)
        elif name == "positional_embedding":
            out["pos_embed"] = tensor.unsqueeze(0)
        else:
            out[_CLIP_STEM.get(name, name)] = tensor
    return out


def _check_names(wanted: set[str], given: set[str]) -> None:
    missing, surplus = sorted(wanted - given), sorted(given - wanted)
    if missing or surplus:
        raise WeightsError(
            f"The image tower lacks {len(missing)} tensors ({', '.join(missing) or 'none'}) and holds {len(surplus)} "
            f"that have no place ({', '.join(surplus) or 'none'}), under timm's names.",
            "Give a complete tower: EVA's, CLIP's, or a plain ViT of timm's.",
        )


def _clip_section(facts: Mapping[str, Any]) -> VisionConfig:
    width = facts["hidden_size"]
    options: dict[str, bool | int | float | str] = {
        "embed_dim": width, "depth": facts["num_hidden_layers"], "num_heads": facts["num_attention_heads"],
        "patch_size": facts["patch_size"], "mlp_ratio": inner_ratio(facts["intermediate_size"], width),
        "final_norm": False,
    }  # fmt: skip
    return VisionConfig(
        name="vit_large_patch14_clip_quickgelu_224", weights="random", options=options, final_norm=False,
        image_size=facts["image_size"],
    )  # fmt: skip
