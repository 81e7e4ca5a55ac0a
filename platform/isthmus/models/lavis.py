"""LAVIS's names for BLIP-2's tensors, and ours.

LAVIS (salesforce/LAVIS, BSD-3) publishes BLIP-2 as one flat state dict. :func:`import_lavis` renames all of it; a
tensor without a place here is an error, never a silent loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import WeightsError
from isthmus.models.qformer import bert_names

# Buffers that repeat what other tensors say: position numbers, and the tied output matrix with its bias.
_REPEATED = {
    "Qformer.bert.embeddings.position_ids": None,
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
_FRAME = {
    "query_tokens": "qformer.queries",
    "temp": "temperature",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in [
            ("ln_vision", "ln_vision"),
            ("vision_proj", "vision_proj"),
            ("text_proj", "text_proj"),
            ("itm_head", "itm_head"),
            ("opt_proj", "projection"),
            ("t5_proj", "projection"),
        ]
        for kind in ("weight", "bias")
    },
}
_FROZEN = ("opt_model.", "t5_model.", "visual_encoder.")


def lavis_names(layers: int) -> dict[str, str]:
    """LAVIS's name -> ours, for every trainable tensor of a Q-Former of ``layers`` layers, stages 1 and 2."""
    names = dict(_FRAME)
    for theirs, ours in bert_names(layers).items():
        names[f"Qformer.{theirs if theirs.startswith('cls.') else f'bert.{theirs}'}"] = f"qformer.{ours}"
    for i in range(layers):
        theirs, ours = f"Qformer.bert.encoder.layer.{i}", f"qformer.layers.{i}"
        pairs = [
            *((f"{theirs}.crossattention.self.{part}", f"{ours}.cross.{part}") for part in ("query", "key", "value")),
            (f"{theirs}.crossattention.output.dense", f"{ours}.cross.output"),
            (f"{theirs}.crossattention.output.LayerNorm", f"{ours}.cross.norm"),
            (f"{theirs}.intermediate_query.dense", f"{ours}.query_ffn.up"),
            (f"{theirs}.output_query.dense", f"{ours}.query_ffn.down"),
            (f"{theirs}.output_query.LayerNorm", f"{ours}.query_ffn.norm"),
        ]
        names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs for kind in ("weight", "bias")}
    return names


def import_lavis(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainable tensors of a LAVIS BLIP-2 under our names.

    Frozen parts (image encoder, language model) are left out: they are bases, named in the recipe.

    Raises:
        WeightsError: a tensor that has no place here, or a repeated tensor that differs from what it repeats.
    """
    numbers = (re.search(r"encoder\.layer\.(\d+)\.", name) for name in state)
    names = lavis_names(1 + max((int(number[1]) for number in numbers if number), default=-1))
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_FROZEN):
            continue
        if name in _REPEATED:
            _check_repeat(name, state)
        elif name not in names:
            raise WeightsError(
                f"The LAVIS checkpoint holds '{name}', which has no place in a Q-Former.", "Import BLIP-2."
            )
        else:
            out[names[name]] = tensor.reshape(1) if name == "temp" else tensor
    return out


def lavis_parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(image tower, language model, the rest) of a LAVIS checkpoint; the first two without their prefix."""
    tower, language, rest = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in state.items():
        if name.startswith("visual_encoder."):
            tower[name.removeprefix("visual_encoder.")] = tensor
        elif name.startswith(("opt_model.", "t5_model.")):
            language[name.split(".", 1)[1]] = tensor
        else:
            rest[name] = tensor
    return tower, language, rest


def _check_repeat(name: str, state: Mapping[str, Tensor]) -> None:
    original = _REPEATED[name]
    if original is None and not torch.equal(state[name].flatten(), torch.arange(state[name].numel())):
        raise WeightsError(
            f"In the LAVIS checkpoint '{name}' does not count 0, 1, 2, ...", "The checkpoint is damaged."
        )
    if original is not None and not torch.equal(state[name], state[original]):
        raise WeightsError(
            f"In the LAVIS checkpoint '{name}' differs from '{original}', to which it is tied.",
            "The checkpoint is damaged, or no BLIP-2.",
        )
