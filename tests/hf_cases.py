"""Small BLIP-2 models of transformers with weights that a wrong map cannot hide behind, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from isthmus.compat import ensure_torchvision
from isthmus.config import LanguageConfig, QFormerConfig, VisionConfig
from isthmus.methods import METHODS
from isthmus.methods.artefact import load_artefact, save_artefact
from isthmus.models.freezing import owned_state
from isthmus.models.text import load_tokenizer
from isthmus.models.vision import VisionEncoder, build_vision
from isthmus.testing.backbones import tiny_bert, tiny_lm, tiny_t5
from method_cases import build, run_config

ensure_torchvision()
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipImageProcessor,
    GenerationConfig,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings  # noqa: E402

__all__ = [
    "AutoProcessor", "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval", "Blip2QFormerConfig",
    "Blip2QFormerModel", "Blip2TextEmbeddings", "Blip2VisionModel", "transformers",
]  # fmt: skip

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


def language_model(folder: Path, family: str) -> LanguageConfig:
    """A tiny decoder-only model, or an encoder-decoder like FLAN-T5."""
    return tiny_t5(folder) if family == "t5" else tiny_lm(folder, family)  # type: ignore[arg-type]


def write_stage2(folder: Path, family: str = "opt", *, eps: float = 1e-6, seed: int = 0, spare: int = 8) -> Any:
    """A Blip2ForConditionalGeneration around a language model of ``family``, saved to ``folder``."""
    language = language_model(folder.parent / f"{folder.name}-lm", family)
    tokenizer = load_tokenizer(language.weights)
    text = AutoConfig.from_pretrained(language.weights)
    text.vocab_size = len(tokenizer) + spare
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    # What the published checkpoints hold: the newline alone for OPT, in the text and in the generation configuration.
    text.eos_token_id = newline if family == "opt" else tokenizer.eos_token_id
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION, layer_norm_eps=eps), qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=text, num_query_tokens=QUERIES, image_token_index=len(tokenizer),
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config).eval()
    if family == "t5":  # transformers ties FLAN-T5's output layer where a model is made of its configuration
        head = model.language_model.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone())
    overwrite(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return model


def images(count: int = 3, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (40, 30 + 7 * i, 3), dtype=np.uint8)) for i in range(count)]


def pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def tower(name: str = "vit_base_patch16_clip_224", **options: Any) -> VisionConfig:
    own = {"pre_norm": False, "norm_layer": "layernorm", "final_norm": False} if "clip" in name else {}
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "patch_size": 8}
    return VisionConfig(
        name=name, weights="random", image_size=SIZE, layer=-1, final_norm=False, options={**sizes, **own, **options}
    )


SHAPE = QFormerConfig(layers=3, width=32, heads=4, feed_forward=40, queries=QUERIES, embed=16, dropout=0.0, init=None)


def own(out: Path, method: str, vision: VisionConfig | None = None, family: str = "opt", **changes: Any) -> Any:
    """A folder of a model that this package made, all its weights drawn anew."""
    vision = vision or tower()
    parts: dict[str, Any] = {"vision": vision, "qformer": SHAPE}
    if method == "blip2_stage1":
        parts["text"] = tiny_bert(out.parent / f"{out.name}-bert")
    else:
        parts["language"] = language_model(out.parent / f"{out.name}-lm", family)
    for key, value in changes.items():
        parts[key] = parts[key].model_copy(update=value) if isinstance(value, dict) and key in parts else value
    config = METHODS[method].config(**parts)
    stage = build(config, with_vision=True)
    module: Any = stage.module
    overwrite(module.vision)  # the recipe says "random": the weights are put into a file that it names
    overwrite_trained(module)
    weights = out.parent / f"{out.name}.safetensors"
    save_file({n: t.contiguous() for n, t in module.vision.model.state_dict().items()}, weights)
    config = config.model_copy(update={"vision": vision.model_copy(update={"weights": str(weights)})})
    whole = build(config, with_vision=True)
    save_artefact(out, owned_state(module), run_config(config), whole, {"made": "here"})
    return load_artefact(out).stage.module


def overwrite_trained(module: torch.nn.Module) -> None:
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    overwrite(module, 5)
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.data.copy_(frozen[name])


def drawn(config: VisionConfig, *, key_bias: bool = True) -> VisionEncoder:
    """An encoder of drawn weights, as EVA is where ``key_bias`` is off: keys without a bias."""
    encoder = build_vision(config)
    overwrite(encoder)
    for name, parameter in encoder.named_parameters():
        if "gamma" in name:  # LayerScale: far from 1 and from 0
            parameter.data.copy_(0.5 + parameter.data)
        if name.endswith("qkv.bias") and not key_bias:
            parameter.data[len(parameter) // 3 : 2 * len(parameter) // 3] = 0.0
    return encoder


def lavis_eva(encoder: VisionEncoder) -> dict[str, torch.Tensor]:
    """A plain ViT's tensors under the names of LAVIS's eva_vit.py."""
    out = {}
    for name, tensor in encoder.model.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert not k.any()
            out[name.replace("qkv.bias", "q_bias")], out[name.replace("qkv.bias", "v_bias")] = q, v
        else:
            out[name] = tensor.clone()
    return out
