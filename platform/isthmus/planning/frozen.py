"""Sizes of the frozen parts that a recipe names, without their weights.

Image encoders are built by timm on the meta device. A language model comes from its config.json where that is at hand,
else from a table of published sizes, and is built by transformers on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from isthmus.compat import ensure_torchvision
from isthmus.config import TextConfig, VisionConfig
from isthmus.errors import ConfigError, WeightsError, nearest
from isthmus.models.text import load_config, load_tokenizer
from isthmus.models.vision import outline_vision
from isthmus.planning.shapes import Activation, Language, Norm, Stack, Vision

ensure_torchvision()
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: E402

_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True}
_T5 = {
    "model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_OPT, "hidden_size": width, "word_embed_proj_dim": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "ffn_dim": 4 * width,
    }  # fmt: skip


def _t5(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return {**_T5, "d_model": width, "d_ff": feed_forward, "num_layers": layers, "num_heads": heads}


# Sizes of Zhang et al. 2022 (OPT, table 1), Raffel et al. 2020 with T5 v1.1's gates (Chung et al. 2022: FLAN-T5), and
# SmolLM2's published config.json.
KNOWN_LANGUAGE: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "flan-t5-base": _t5(768, 2048, 12, 12),
    "flan-t5-large": _t5(1024, 2816, 24, 16),
    "flan-t5-xl": _t5(2048, 5120, 24, 32),
    "flan-t5-xxl": _t5(4096, 10240, 24, 64),
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}  # fmt: skip

# (rows of the vocabulary, rows of the position table), by the models' config.json.
KNOWN_TEXT = {"bert-base-uncased": (30522, 512), "bert-large-uncased": (30522, 512), "all-minilm-l6-v2": (30522, 512)}


def measure_vision(config: VisionConfig) -> Vision:
    """Sizes and operations of an image encoder: one image goes through it on the meta device.

    Raises:
        ConfigError: an unknown name or layer, or an encoder without tokens.
    """
    with torch.device("meta"), torch.no_grad():
        model, encode, size = outline_vision(config)
        pixels = torch.zeros(1, 3, size, size)
        with FlopCounterMode(display=False) as counter, _Widest() as widest:
            tokens_BND = encode(pixels)
    parameters = sum(p.numel() for p in model.parameters())
    return Vision(
        parameters, int(tokens_BND.shape[1]), int(tokens_BND.shape[2]), size, float(counter.get_total_flops()),
        widest.elements,
    )  # fmt: skip


class _Widest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Parameters pass through as views; what is computed is what has a batch in front.
        if isinstance(out, Tensor) and out.ndim > 2 and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def text_sizes(config: TextConfig) -> tuple[int, int]:
    """(rows of the vocabulary, rows of the position table) of a recipe's text weights.

    Raises:
        WeightsError: neither in the table nor at hand.
    """
    key = _short(config.weights)
    if key in KNOWN_TEXT:
        return KNOWN_TEXT[key]
    if not Path(config.weights).expanduser().exists():
        raise WeightsError(
            f"The sizes of '{config.weights}' are not known, and it is no folder here.{nearest(key, KNOWN_TEXT)}",
            f"Give a folder with config.json and tokenizer, or plan with method.text.weights=hf:google-bert/"
            f"bert-base-uncased@main. Known: {', '.join(KNOWN_TEXT)}.",
        )
    return len(load_tokenizer(config.weights)), int(load_config(config.weights).max_position_embeddings)


def measure_language(weights: str, *, parameters: float = 0, width: int = 0, layers: int = 0) -> Language:
    """Sizes of a frozen language model.

    Args:
        weights: as a recipe names it.
        parameters, width, layers: of a decoder-only model that neither the table nor this machine knows; all or none.

    Raises:
        ConfigError: some of the three, but not all, or they do not go together.
        WeightsError: sizes that are not known.
    """
    given = (parameters, width, layers)
    if any(given):
        if not all(given):
            raise ConfigError(
                "A language model of unknown sizes needs three of them.",
                "Give --language-params, --language-width and --language-layers.",
            )
        return _described(_generic(int(parameters), width, layers), "the options given")
    key = _short(weights)
    if key in KNOWN_LANGUAGE:
        return _described(AutoConfig.for_model(**KNOWN_LANGUAGE[key]), f"published sizes of {key}")
    if Path(weights).expanduser().exists():
        return _described(load_config(weights), f"{weights}/config.json")
    if weights.startswith("hf:"):
        name, _, revision = weights.removeprefix("hf:").partition("@")
        try:  # the hub's cache on this machine; nothing is fetched
            return _described(
                AutoConfig.from_pretrained(name, revision=revision or None, local_files_only=True), "the hub's cache"
            )
        except (OSError, ValueError):
            pass
    raise WeightsError(
        f"The sizes of the language model '{weights}' are not known here.{nearest(key, KNOWN_LANGUAGE)}",
        "Give --language-params, --language-width and --language-layers, or name a folder that holds its config.json. "
        f"Known: {', '.join(KNOWN_LANGUAGE)}.",
    )


def _short(weights: str) -> str:
    """The model's name without organisation, revision and marks of tuning that changes no size."""
    name = weights.removeprefix("hf:").removeprefix("pkg:").partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    return name.removesuffix("-instruct") if name.startswith("smollm2") else name


def _generic(parameters: int, width: int, layers: int) -> Any:
    """OPT's blocks, with a vocabulary that makes up the rest of the parameters."""
    heads = next((width // size for size in (128, 64, 80, 96, 32) if width % size == 0), 1)
    rest = parameters - layers * (12 * width * width + 13 * width) - 2 * width
    vocab = rest // width - 2050
    if vocab < 1:
        raise ConfigError(
            f"{layers} layers of width {width} have more than {parameters:,} parameters.",
            "Look again at --language-params, --language-width and --language-layers.",
        )
    return AutoConfig.for_model(**{**_opt(width, layers, heads), "vocab_size": vocab})


def _described(config: Any, source: str) -> Language:
    """The model that a transformers configuration describes, built on the meta device."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        try:
            model: Any = kind.from_config(config)
        except (ValueError, KeyError) as error:
            raise WeightsError(f"A '{config.model_type}' model cannot be planned: {error}.") from error
    if config.model_type == "t5" and not config.scale_decoder_outputs:
        # transformers ties what it builds from a configuration; T5 v1.1 and FLAN have an output matrix of their own.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    width = int(model.get_input_embeddings().embedding_dim)
    head = model.get_output_embeddings()
    encoder, cross = None, 0
    if config.is_encoder_decoder:
        cross = _elements(model.decoder, lambda name: ".EncDecAttention.k" in name or ".EncDecAttention.v" in name)
        encoder = _stack(config, model.encoder, 0)
    decoder = _stack(config, model.decoder if config.is_encoder_decoder else model.base_model, cross)
    return Language(
        sum(p.numel() for p in model.parameters()), int(head.weight.shape[0]), width, decoder, encoder, cross,
        _activation(config), _norm(config), config.model_type not in ("gpt2", "t5"), source, config,
    )  # fmt: skip


def _stack(config: Any, module: nn.Module, cross: int) -> Stack:
    heads = int(config.num_attention_heads)
    per_head = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = getattr(config, "num_decoder_layers", None) if cross else None
    named = (getattr(config, name, None) for name in ("ffn_dim", "d_ff", "intermediate_size", "n_inner"))
    feed_forward = next((int(value) for value in named if value is not None), 4 * int(config.hidden_size))
    return Stack(
        int(layers or config.num_hidden_layers), int(config.hidden_size), heads, heads * int(per_head), feed_forward,
        _elements(module, lambda _: True) - cross,
    )  # fmt: skip


def _elements(module: nn.Module, chosen: Any) -> int:
    """Elements of the weight matrices whose names are chosen: linear layers, and GPT-2's own kind of them."""
    return sum(
        math.prod(cast(Tensor, part.weight).shape)
        for name, part in module.named_modules()
        if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D") and chosen(name)
    )


def _activation(config: Any) -> Activation:
    named: Mapping[str, Any] = config.to_dict()
    if named.get("is_gated_act") or config.model_type not in ("opt", "gpt2", "t5"):
        return "gated"
    name = str(named.get("activation_function") or named.get("dense_act_fn") or "relu")
    return "relu" if name == "relu" else "gelu_new" if name == "gelu_new" else "gelu"


def _norm(config: Any) -> Norm:
    return "t5" if config.model_type == "t5" else "layer" if config.model_type in ("opt", "gpt2") else "rms"
