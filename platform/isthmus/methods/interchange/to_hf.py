"""A model folder as a folder that stock transformers opens.

Stage 1 becomes a ``Blip2ForImageTextRetrieval``, stage 2 a ``Blip2ForConditionalGeneration``, each with its processor.
What transformers' classes have no place for lies beside their files: tensors in ``isthmus.safetensors``, the recipe.

Shape letters: B images, N image tokens, D vision width, Q queries, M Q-Former width.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from isthmus.compat import ensure_torchvision
from isthmus.data.transforms import ImageTransform
from isthmus.errors import ConfigError, WeightsError
from isthmus.methods.artefact import LINEAGE, RECIPE, Artefact, load_artefact
from isthmus.methods.interchange.epsilon import noise, query_outputs
from isthmus.methods.interchange.folder import fresh_folder
from isthmus.models.attention import ImageTokens
from isthmus.models.freezing import owned_state
from isthmus.models.hf.files import EXTRA, untied, write_folder
from isthmus.models.hf.names import CLASSES, LANGUAGE, TOWER, Kind, qformer_names, to_hf
from isthmus.models.hf.tokens import IMAGE, add_dec, place_image_token
from isthmus.models.hf.tower import Tower, export_tower
from isthmus.models.qformer import EPS
from isthmus.models.text import load_tokenizer

ensure_torchvision()
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    Blip2Config,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessor,
)

TOLERANCE = 1e-4
"""Accepted difference between the queries' outputs here and in the exported model: root mean square, where the outputs
themselves have unit variance. It comes from ln_vision, whose epsilon is 1e-5 here and in LAVIS, and there that of the
image encoder's blocks: a token of variance v comes out larger there by the factor 1 + 4.5e-6 / v."""

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        out: the folder. kind: transformers' class that opens it.
        tensors, parameters: in the files that transformers reads.
        beside: our names of the tensors in ``isthmus.safetensors``.
        unused: tensors of image-encoder blocks behind the one that the recipe takes; they stay out.
        query_difference: of the queries' outputs to this package's, on images of noise; see :data:`TOLERANCE`.
        image_token: id of ``<image>``, or None in stage 1.
    """

    out: str
    kind: str
    tensors: int
    parameters: int
    beside: tuple[str, ...]
    unused: int
    query_difference: float
    image_token: int | None


def export_hf(model: str | Path, out: str | Path, *, check: bool = True, tolerance: float = TOLERANCE) -> Export:
    """Writes the model folder ``model`` to ``out`` in Hugging Face layout, in float32.

    Args:
        model: what :func:`isthmus.methods.artefact.save_artefact` wrote.
        out: a folder that does not exist or is empty; it appears whole or not at all.
        check: open the result with stock transformers, and refuse it if a tensor is missing, left over or of another
            shape, or the tokenizer does not give back the ids. Takes the memory of a second model.
        tolerance: see :data:`TOLERANCE`.

    Raises:
        ConfigError: what the model does cannot be said exactly in transformers' classes; all reasons are given.
        WeightsError: a tensor without a place, or an export that does not open as it should.
    """
    artefact = load_artefact(model)
    kind = _exportable(artefact)
    module: Any = artefact.stage.module
    tower = export_tower(module.vision, module.config.vision)
    shape = module.config.qformer
    mapped, homeless = to_hf(owned_state(module), qformer_names(kind, shape.layers, shape.cross_every))
    difference = _query_difference(module, tower, tolerance)
    state = {**mapped, **{f"{TOWER}{name}": tensor for name, tensor in tower.state.items()}}
    if kind == "blip2_stage2":
        language = untied(module.language.model.state_dict())
        state |= {f"{LANGUAGE}{name}": tensor for name, tensor in language.items()}
    tokenizer, image_token = _tokenizer(module, kind)
    config = _config(module, kind, tower, image_token)
    with fresh_folder(out) as scratch:
        config.save_pretrained(scratch)
        if kind == "blip2_stage2":
            module.language.model.generation_config.save_pretrained(scratch)
        write_folder(state, scratch)
        _processor(artefact.stage.transform, tokenizer, kind, shape.queries).save_pretrained(scratch)
        if homeless:
            save_file(homeless, scratch / EXTRA, metadata={"format": "pt"})
        for name in (RECIPE, LINEAGE):
            shutil.copyfile(Path(model) / name, scratch / name)
        if check:
            _check(scratch, kind, module, tokenizer, image_token)
    parameters = sum(tensor.numel() for tensor in state.values())
    return Export(
        str(out), CLASSES[kind], len(state), parameters, tuple(sorted(homeless)), len(tower.unused), difference,
        image_token,
    )  # fmt: skip


def _exportable(artefact: Artefact) -> Kind:
    config: Any = artefact.recipe.method
    if config.name not in CLASSES:
        raise ConfigError(
            f"A '{config.name}' model has no place in Hugging Face's layout.", f"Export a {' or a '.join(CLASSES)}."
        )
    reasons = []
    if config.qformer.compression is not None:
        reasons.append("its queries read thinned-out image tokens (qformer.compression), and transformers' read all")
    if config.name == "blip2_stage1":
        if config.weights.itm == 0:
            reasons.append("it was trained without ITM (weights.itm 0), and Blip2ForImageTextRetrieval has an itm_head")
        if config.qformer.text_pool != "first":
            reasons.append(
                "its text vectors are means of the tokens (qformer.text_pool), and transformers takes [CLS]'s"
            )
    else:
        language, model = config.language, artefact.stage.module.language.model  # type: ignore[union-attr]
        if getattr(language, "opening", "text") == "first":
            reasons.append(
                "its begin-of-sequence token stands before the soft prompt (language.opening first), and "
                "Blip2Processor puts it behind"
            )
        if artefact.stage.module.language.width != model.config.hidden_size:  # type: ignore[union-attr]
            reasons.append(
                "its language model's embeddings are not as wide as its hidden states, to which transformers projects"
            )
    if reasons:
        raise ConfigError(f"This model cannot be exported to Hugging Face exactly: {'; '.join(reasons)}.")
    return config.name


# --- what it must agree with ----------------------------------------------------------------------------------------


@torch.no_grad()
def _query_difference(module: Any, tower: Tower, tolerance: float) -> float:
    """Root mean square difference of the queries' outputs between our tower and norm and transformers', on two images
    of noise.

    Raises:
        ConfigError: it is above ``tolerance``.
    """
    theirs = Blip2VisionModel._from_config(Blip2VisionConfig(**tower.config)).eval()
    norm: nn.LayerNorm = module.ln_vision
    closing = {"post_layernorm.weight": norm.weight, "post_layernorm.bias": norm.bias}
    theirs.load_state_dict({**tower.state, **closing}, strict=True)
    pixels_BCHW = noise(tower.config["image_size"])
    ours = query_outputs(module, module.ln_vision(module.encode_images(pixels_BCHW), module.qformer.queries.dtype))
    other = query_outputs(module, ImageTokens(theirs(pixel_values=pixels_BCHW).last_hidden_state))
    difference = float((ours - other).pow(2).mean().sqrt())
    if not difference <= tolerance:  # also where it is no number
        raise ConfigError(
            f"Exported to Hugging Face, this model's queries would differ by {difference:.1e} (at most {tolerance:g} "
            f"is accepted): there ln_vision has the epsilon {tower.config['layer_norm_eps']:g} of the image encoder's "
            f"blocks, here 1e-5, and the encoder's tokens vary little enough for that to matter.",
            f"An encoder with trained weights does not show it; --tolerance {difference * 1.5:.1g} accepts it.",
        )
    return difference


# --- tokenizer, processor, configuration -----------------------------------------------------------------------------


def _tokenizer(module: Any, kind: Kind) -> tuple[Any, int | None]:
    """A tokenizer of its own, as the exported processor holds it, and the id of ``<image>``."""
    if kind == "blip2_stage1":
        tokenizer = load_tokenizer(module.config.text.weights)
        if (dec := add_dec(tokenizer)) != module.qformer.dec_id:
            raise WeightsError(f"[DEC] would get the id {dec}, and the model has it at {module.qformer.dec_id}.")
        return tokenizer, None
    language = module.language
    tokenizer = load_tokenizer(module.config.language.weights)
    generation = language.model.generation_config
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(generation.pad_token_id)
    keep = {generation.pad_token_id, generation.eos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    keep.add(getattr(language, "bos_id", None))
    rows = language.model.get_input_embeddings().num_embeddings
    image = place_image_token(tokenizer, rows, keep)
    # Behind the soft prompt a decoder continues the text's last token; an encoder reads whatever side is padded.
    tokenizer.padding_side = "right" if language.model.config.is_encoder_decoder else "left"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # what is saved
    return tokenizer, image


def _processor(transform: Any, tokenizer: Any, kind: Kind, queries: int) -> Any:
    assert isinstance(transform, ImageTransform)
    images = BlipImageProcessor(
        size={"height": transform.size, "width": transform.size},
        resample=_RESAMPLE[transform.interpolation],
        image_mean=list(transform.mean),
        image_std=list(transform.std),
    )
    # Stage 1 reads text as it is: no <image> tokens before it, which the class would only cut off again.
    return Blip2Processor(images, tokenizer, num_query_tokens=0 if kind == "blip2_stage1" else queries)


def _config(module: Any, kind: Kind, tower: Tower, image_token: int | None) -> Any:
    shape, text = module.config.qformer, kind == "blip2_stage1"
    qformer: dict[str, Any] = {
        "hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "intermediate_size": shape.feed_forward, "hidden_dropout_prob": shape.dropout, "layer_norm_eps": EPS,
        "attention_probs_dropout_prob": shape.dropout, "cross_attention_frequency": shape.cross_every,
        "encoder_hidden_size": tower.config["hidden_size"], "use_qformer_text_input": text,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if text:
        qformer |= {
            "vocab_size": module.qformer.words.num_embeddings,
            "max_position_embeddings": module.qformer.positions.num_embeddings,
            "pad_token_id": module.tokenizer.pad_token_id,
        }
    else:
        more["text_config"] = _text_config(module.language)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**tower.config),
        qformer_config=Blip2QFormerConfig(**qformer),
        num_query_tokens=shape.queries,
        image_text_hidden_size=shape.embed,
        image_token_index=image_token,
        **more,
    )
    config.architectures, config.dtype = [CLASSES[kind]], torch.float32
    return config


def _text_config(language: Any) -> Any:
    """The language model's configuration, with the ends of a caption in it: ``generate`` reads them from there."""
    config = copy.deepcopy(language.model.config)
    generation = language.model.generation_config
    config.eos_token_id, config.pad_token_id = generation.eos_token_id, generation.pad_token_id
    if (bos := getattr(language, "bos_id", None)) is not None:
        config.bos_token_id = bos
    if config.is_encoder_decoder and generation.decoder_start_token_id is not None:
        config.decoder_start_token_id = generation.decoder_start_token_id
    config.dtype = torch.float32
    return config


def _check(folder: Path, kind: Kind, module: Any, tokenizer: Any, image_token: int | None) -> None:
    """Opens the export as a stranger would.

    Raises:
        WeightsError: tensors missing, left over or of another shape, or a tokenizer that is not the one that was saved.
    """
    opened, report = getattr(transformers, CLASSES[kind]).from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if wrong:
        raise WeightsError(f"transformers opens the export with {json.dumps(wrong)}.", "This model cannot be exported.")
    del opened
    processor = AutoProcessor.from_pretrained(folder)
    ours = module.tokenizer if kind == "blip2_stage1" else module.language.tokenizer
    for text in ("a photo of", "two dogs, and a red ball!", "naïve 猫 😀"):
        if processor.tokenizer(text)["input_ids"] != ours(text)["input_ids"]:
            raise WeightsError(f"The exported tokenizer reads '{text}' differently.", "This tokenizer cannot be saved.")
    wanted = (tokenizer.padding_side, tokenizer.pad_token_id, image_token)
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE) if image_token is not None else None
    found = (processor.tokenizer.padding_side, processor.tokenizer.pad_token_id, image)
    if found != wanted:
        raise WeightsError(
            f"The exported tokenizer has padding side, padding and {IMAGE} {found}, and should have {wanted}.",
            "This tokenizer cannot be saved.",
        )
