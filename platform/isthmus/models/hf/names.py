"""The trainable tensors' names in transformers' Blip2 classes, and ours.

``Blip2ForImageTextRetrieval`` holds stage 1 without its caption head and temperature, ``Blip2ForConditionalGeneration``
holds stage 2. Every map here is a bare renaming: no tensor is changed by a trip in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from isthmus.errors import WeightsError

Kind = Literal["blip2_stage1", "blip2_stage2"]

CLASSES: dict[Kind, str] = {
    "blip2_stage1": "Blip2ForImageTextRetrieval",
    "blip2_stage2": "Blip2ForConditionalGeneration",
}
TOWER, LANGUAGE, NORM = "vision_model.", "language_model.", "vision_model.post_layernorm."
HOMELESS = ("temperature", "qformer.lm_head.")
"""Our names, or their beginnings, of stage-1 tensors that transformers' classes have no place for."""

_COUNTERS = re.compile(r"(^|\.)position_ids$")
_LAYER = re.compile(r"^qformer\.encoder\.layer\.(\d+)\.")


def qformer_names(kind: Kind, layers: int, cross_every: int) -> dict[str, str]:
    """Their name -> ours, for every trainable tensor that transformers' class of this stage holds."""
    text = kind == "blip2_stage1"
    names = {"query_tokens": "qformer.queries"}
    pairs = [("qformer.layernorm", "qformer.embedding_norm"), (NORM.rstrip("."), "ln_vision")]
    if text:
        names["embeddings.word_embeddings.weight"] = "qformer.words.weight"
        names["embeddings.position_embeddings.weight"] = "qformer.positions.weight"
        pairs += [("vision_projection", "vision_proj"), ("text_projection", "text_proj"), ("itm_head", "itm_head")]
    else:
        pairs.append(("language_projection", "projection"))
    for i in range(layers):
        theirs, ours = f"qformer.encoder.layer.{i}", f"qformer.layers.{i}"
        pairs += _attention(f"{theirs}.attention", f"{ours}.attention")
        if i % cross_every == 0:
            pairs += _attention(f"{theirs}.crossattention", f"{ours}.cross")
        for suffix, ffn in (("_query", "query_ffn"), ("", "text_ffn"))[: 2 if text else 1]:
            pairs += [
                (f"{theirs}.intermediate{suffix}.dense", f"{ours}.{ffn}.up"),
                (f"{theirs}.output{suffix}.dense", f"{ours}.{ffn}.down"),
                (f"{theirs}.output{suffix}.LayerNorm", f"{ours}.{ffn}.norm"),
            ]
    return names | {f"{a}.{part}": f"{b}.{part}" for a, b in pairs for part in ("weight", "bias")}


def _attention(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [
        *((f"{theirs}.attention.{part}", f"{ours}.{part}") for part in ("query", "key", "value")),
        (f"{theirs}.output.dense", f"{ours}.output"),
        (f"{theirs}.output.LayerNorm", f"{ours}.norm"),
    ]


def kind_of(names: Iterable[str]) -> Kind:
    """Which stage a checkpoint's names are of.

    Raises:
        WeightsError: neither.
    """
    found = set(names)
    if any(name.startswith("itm_head.") for name in found):
        return "blip2_stage1"
    if any(name.startswith("language_projection.") for name in found):
        return "blip2_stage2"
    raise WeightsError(
        "The checkpoint holds neither an itm_head nor a language_projection.",
        f"Give the folder of a {CLASSES['blip2_stage1']} or a {CLASSES['blip2_stage2']}.",
    )


def layers_of(names: Iterable[str]) -> int:
    """Layers of the Q-Former whose tensors are named."""
    return 1 + max((int(found[1]) for name in names if (found := _LAYER.match(name))), default=-1)


def to_hf(state: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors under their names, those of ours that have no place there, under our names).

    Args:
        state: a model's trainable tensors.
        names: :func:`qformer_names`.

    Raises:
        WeightsError: a tensor that has no place and is none of :data:`HOMELESS`, or a place without a tensor.
    """
    homeless = {name: tensor for name, tensor in state.items() if name.startswith(HOMELESS)}
    _check_sets(set(names.values()), set(state) - set(homeless), "The model")
    return {theirs: state[ours] for theirs, ours in names.items()}, homeless


def from_hf(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The trainable tensors under our names.

    Args:
        state: a checkpoint's tensors without image tower (its closing norm belongs here) and language model.
        names: :func:`qformer_names`.

    Raises:
        WeightsError: a tensor without a place here, or a place without a tensor; all of them are listed.
    """
    _check_sets(set(names), set(state), "The checkpoint")
    return {ours: state[theirs] for theirs, ours in names.items()}


def without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the position numbers 0, 1, 2, ... that older versions saved.

    Raises:
        WeightsError: such a tensor holds anything else.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _COUNTERS.search(name):
            out[name] = tensor
        elif not torch.equal(tensor.flatten(), torch.arange(tensor.numel(), dtype=tensor.dtype)):
            raise WeightsError(f"'{name}' of the checkpoint does not count 0, 1, 2, ...", "The checkpoint is damaged.")
    return out


def _check_sets(wanted: set[str], given: set[str], what: str) -> None:
    if missing := sorted(wanted - given):
        raise WeightsError(
            f"{what} lacks {len(missing)} tensors: {', '.join(missing)}.",
            "All of them are needed; give a complete checkpoint.",
        )
    if surplus := sorted(given - wanted):
        raise WeightsError(
            f"{what} holds {len(surplus)} tensors that have no place on the other side: {', '.join(surplus)}.",
            "Nothing is left out silently; is it a BLIP-2 of this kind?",
        )
