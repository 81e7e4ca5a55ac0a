"""Small BLIP-2 models of transformers with weights that a wrong map cannot hide behind, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from isthmus.compat import ensure_torchvision
from isthmus.models.text import load_tokenizer
from isthmus.testing.backbones import tiny_bert, tiny_lm

ensure_torchvision()
from transformers import (  # noqa: E402
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
)

SIZE, QUERIES = 32, 4
VISION: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
}  # fmt: skip


def overwrite(module: nn.Module, seed: int = 0) -> None:
    """N(0, .15) everywhere and layer norms 1 +- .1: fresh weights of these classes are zero or 1e-10 in places."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__}
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(1.0 + 0.1 * draw if id(parameter) in norms else 0.15 * draw)


def eps_of_blocks(model: nn.Module, eps: float) -> None:
    """ln_vision's epsilon in transformers' model."""
    model.vision_model.post_layernorm.eps = eps  # type: ignore[union-attr, assignment]


def image_processor(**changes: Any) -> Any:
    return BlipImageProcessor(size={"height": SIZE, "width": SIZE}, **changes)


def write_stage1(folder: Path, *, eps: float = 1e-6, seed: int = 0) -> Any:
    """A Blip2ForImageTextRetrieval with a WordPiece tokenizer that has [DEC], saved to ``folder``."""
    text = tiny_bert(folder.parent / f"{folder.name}-bert")
    tokenizer = load_tokenizer(text.weights)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    qformer = {**QFORMER, "vocab_size": len(tokenizer), "use_qformer_text_input": True, "max_position_embeddings": 24}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, layer_norm_eps=eps), qformer_config=Blip2QFormerConfig(**qformer),
        num_query_tokens=QUERIES, image_text_hidden_size=16,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config).eval()
    overwrite(model, seed)
    model.save_pretrained(folder)
    Blip2Processor(image_processor(), tokenizer, num_query_tokens=0).save_pretrained(folder)
    return model


def write_stage2(folder: Path, family: str = "opt", *, eps: float = 1e-6, seed: int = 0, spare: int = 8) -> Any:
    """A Blip2ForConditionalGeneration around a language model of ``family``, saved to ``folder``."""
    language = tiny_lm(folder.parent / f"{folder.name}-lm", family)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(language.weights)
    text = AutoConfig.from_pretrained(language.weights)
    text.vocab_size = len(tokenizer) + spare
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    text.eos_token_id = [newline, tokenizer.eos_token_id] if family == "opt" else tokenizer.eos_token_id
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, layer_norm_eps=eps), qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=text, num_query_tokens=QUERIES, image_token_index=len(tokenizer),
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config).eval()
    overwrite(model, seed)
    model.save_pretrained(folder)
    Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return model


def images(count: int = 3, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + 7 * i, 3), dtype=np.uint8)) for i in range(count)]


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
