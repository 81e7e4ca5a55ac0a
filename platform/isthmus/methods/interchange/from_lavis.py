"""A LAVIS BLIP-2 checkpoint as a model folder, every tensor of it.

LAVIS saves what it trained: the Q-Former, often without image tower, never with its own language model's files. What
the checkpoint leaves out has to be named.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from isthmus.config import LanguageConfig, MethodConfig, QFormerConfig, TextConfig, VisionConfig
from isthmus.errors import WeightsError
from isthmus.methods.artefact import BASES_FOLDER
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2Config
from isthmus.methods.interchange.folder import VISION, Import, bases, digest, finish, fresh_folder
from isthmus.models.hf.files import read_file
from isthmus.models.hf.foreign import read_tower
from isthmus.models.lavis import import_lavis, lavis_names, lavis_parts
from isthmus.models.text import load_tokenizer

log = logging.getLogger(__name__)

BERT = "pkg:all-minilm-l6-v2"
"""Carries the vocabulary of bert-base-uncased, which LAVIS's Q-Former reads."""
_BERT_TOKENS = 30522
_EITHER = frozenset(f"{part}.{kind}" for part in ("opt_proj", "t5_proj") for kind in ("weight", "bias"))
"""Of these a checkpoint has one pair; both are our projection."""


def import_lavis_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    language: str | None = None,
    text: str | None = None,
    heads: int | None = None,
    vision_heads: int | None = None,
    layer: int | None = None,
    name: str | None = None,
) -> Import:
    """Writes a ``.pth`` of LAVIS ({"model": state}, or the state itself) as the model folder ``out``.

    Args:
        vision: file with the image tower, where the checkpoint holds none.
        language: the language model of stage 2, as a recipe names it.
        text: the tokenizer of stage 1, likewise; by default one with BERT's vocabulary, where that fits.
        heads: of the Q-Former; by default one for every 64 of its width, as BERT has them.
        vision_heads, layer: see :func:`isthmus.models.hf.foreign.read_tower`.
        name: of the recipe; the folder's by default.

    Raises:
        WeightsError: an unreadable file, a tensor that has no place or is missing, or a part that is not named.
    """
    file = Path(source).expanduser()
    whole = read_file(file)
    tower, frozen, trained = lavis_parts(whole)
    mapped = import_lavis(trained)
    qformer = _qformer(mapped, heads)
    notes: list[str] = []
    section, tower = _tower(file, tower, vision, vision_heads, layer, notes)
    with fresh_folder(out) as scratch:
        save_file({n: t.contiguous() for n, t in tower.items()}, bases(scratch) / VISION, metadata={"format": "pt"})
        section = section.model_copy(update={"weights": f"{BASES_FOLDER}/{VISION}"})
        method: MethodConfig
        if "projection.weight" in mapped:
            if language is None:
                raise WeightsError(
                    f"{file} is a stage-2 checkpoint, and LAVIS saves no language model.", "Name it: --language."
                )
            method = Blip2Stage2Config(vision=section, qformer=qformer, language=LanguageConfig(weights=language))
        else:
            method = Blip2Stage1Config(vision=section, qformer=qformer, text=_text(mapped, text))
        lineage = {"imported": {"from": "lavis", "path": str(file.absolute()), "digest": digest(whole)}}
        finish(
            scratch,
            name or Path(out).name,
            method,
            mapped,
            lineage,
            language=frozen or None,
            names={n: ours for n, ours in lavis_names(qformer.layers).items() if n in trained or n not in _EITHER},
        )
    for note in notes:
        log.warning("%s", note)
    named = None if isinstance(method, Blip2Stage2Config) else method.text.weights  # type: ignore[union-attr]
    return Import(
        str(out), method.name, len(mapped), sum(t.numel() for t in mapped.values()),
        str(Path(out).absolute() / BASES_FOLDER / VISION), language, named, tuple(notes),
    )  # fmt: skip


def _qformer(mapped: Mapping[str, Tensor], heads: int | None) -> QFormerConfig:
    def numbers(pattern: str) -> list[int]:
        return sorted({int(found[1]) for name in mapped if (found := re.match(pattern, name))})

    layers, crossing = numbers(r"qformer\.layers\.(\d+)\."), numbers(r"qformer\.layers\.(\d+)\.cross\.")
    if not layers or not crossing or "qformer.queries" not in mapped:
        raise WeightsError("The checkpoint holds no Q-Former.", "Give a BLIP-2 of LAVIS.")
    _, queries, width = mapped["qformer.queries"].shape
    if heads is None and width % 64:
        raise WeightsError(f"The Q-Former is {width} wide, which is no multiple of 64.", "Say its heads: --heads.")
    positions, projected = mapped.get("qformer.positions.weight"), mapped.get("vision_proj.weight")
    return QFormerConfig(
        layers=layers[-1] + 1,
        width=width,
        heads=heads or width // 64,
        feed_forward=len(mapped["qformer.layers.0.query_ffn.up.weight"]),
        queries=queries,
        cross_every=crossing[1] - crossing[0] if len(crossing) > 1 else layers[-1] + 1,
        embed=len(projected) if projected is not None else 256,
        positions=len(positions) if positions is not None else None,
        init=None,
    )


def _text(mapped: Mapping[str, Tensor], text: str | None) -> TextConfig:
    words = len(mapped["qformer.words.weight"]) - 1  # the last row is [DEC]'s
    if text is None and words != _BERT_TOKENS:
        raise WeightsError(
            f"The Q-Former reads {words} tokens, and bert-base-uncased has {_BERT_TOKENS}.",
            "Name the tokenizer: --text.",
        )
    config = TextConfig(weights=text or BERT)
    if (found := len(load_tokenizer(config.weights))) != words:
        raise WeightsError(
            f"The tokenizer of '{config.weights}' has {found} tokens, and the Q-Former reads {words}.",
            "Name the tokenizer that it was trained with: --text.",
        )
    return config


def _tower(
    file: Path,
    inside: dict[str, Tensor],
    named: str | Path | None,
    heads: int | None,
    layer: int | None,
    notes: list[str],
) -> tuple[VisionConfig, dict[str, Tensor]]:
    if inside and named:
        raise WeightsError(f"{file} holds an image tower of its own.", "Leave --vision out.")
    if not inside and not named:
        raise WeightsError(
            f"{file} holds no image tower: LAVIS leaves frozen parts out.",
            "Name the file of the tower that it was trained with: --vision.",
        )
    # A tower inside has lost its closing block already; one of its own may have it still.
    state: Any = inside or read_file(Path(str(named)).expanduser())
    section, tower, unused = read_tower(state, heads=heads, layer=layer if named else -1)
    if unused and inside:
        raise WeightsError(f"{file} holds tensors without a place: {', '.join(f'visual_encoder.{n}' for n in unused)}.")
    if unused:
        notes.append(f"Of {named}, which BLIP-2 takes before its end, {len(unused)} tensors stay out: {unused[0]}, ...")
    return section, tower
