"""Text encoders: tokenizer, a BERT's raw weights for a Q-Former's start, and a frozen sentence encoder of any family.

Shape letters: B batch, T text tokens, D width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import TextConfig
from isthmus.contracts import Base
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.freezing import freeze_all, state_digest
from isthmus.models.weights import read_state, resolve

ensure_torchvision()
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()  # ours are the only bars

_OLD_NAMES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))


def load_tokenizer(weights: str) -> Any:
    """The tokenizer that belongs to ``weights`` (a transformers tokenizer).

    Raises:
        ConfigError, WeightsError: as :func:`isthmus.models.weights.resolve`; or no tokenizer there.
    """
    path = resolve(weights)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"'{weights}' holds no tokenizer.", "It needs tokenizer.json or vocab.txt.") from error


def load_bert(weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a BERT, for modules that take over its layers.

    Returns:
        config (Hugging Face keys, e.g. ``hidden_size``) and state under BertModel's names (``embeddings...``,
        ``encoder.layer.0...``); those of a masked-LM head, where there is one, keep their prefix ``cls.``.

    Raises:
        ConfigError: the weights are not a BERT's.
        WeightsError: see :func:`isthmus.models.weights.resolve`.
    """
    path = resolve(weights)
    config = load_config(weights)
    if config.model_type != "bert":
        raise ConfigError(
            f"'{weights}' is a '{config.model_type}' model, and a BERT is needed.",
            "Name BERT weights, or set init: null.",
        )
    state = {}
    for name, tensor in read_state(path).items():
        name = name.removeprefix("bert.")
        for old, new in _OLD_NAMES:
            name = name.replace(old, new)
        if not name.endswith("position_ids"):  # a buffer that old checkpoints carry
            state[name] = tensor
    return config.to_dict(), state


class SentenceEncoder(nn.Module):
    """A frozen text encoder in eval mode, whatever its parent's mode.

    Attributes:
        width: D. base: source and digest of the weights. tokenizer: the transformers tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TextConfig, width: int) -> None:
        super().__init__()
        freeze_all(model)
        self.model, self.tokenizer, self.width, self.max_length = model, tokenizer, width, config.max_length
        self.base = Base("text", config.weights, state_digest(model))

    def train(self, mode: bool = True) -> SentenceEncoder:
        """Stays in eval mode."""
        del mode
        return super().train(False)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and 0/1 mask, int64 [B, T], right-padded to the longest, at most ``max_length``. A text without a token,
        where the tokenizer adds none of its own, is read as one of padding: there has to be something to average."""
        tokens = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids_BT, mask_BT = tokens["input_ids"].long(), tokens["attention_mask"].long()
        if ids_BT.shape[1] == 0:
            blank = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
            ids_BT, mask_BT = ids_BT.new_full((len(texts), 1), blank), mask_BT.new_zeros((len(texts), 1))
        mask_BT[:, 0] = 1  # of right padding the first place is empty only where all are
        return ids_BT, mask_BT

    @torch.no_grad()
    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Token states [B, T, D] and their mean over the mask [B, D] (not normalised)."""
        tokens_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weight_BT1 = mask_BT.unsqueeze(-1).to(tokens_BTD.dtype)
        return tokens_BTD, (tokens_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1.0)


def build_sentence_encoder(config: TextConfig) -> SentenceEncoder:
    """The frozen encoder that ``config`` names, in float32: an encoder, the encoder of an encoder-decoder such as T5,
    or a decoder-only language model, whose states are averaged as an encoder's are.

    Raises:
        ConfigError, WeightsError: as :func:`load_bert`.
    """
    facts = load_config(config.weights)
    extra = {"add_pooling_layer": False} if facts.model_type in ("bert", "roberta", "xlm-roberta") else {}
    kind = AutoModelForTextEncoding if facts.is_encoder_decoder else AutoModel
    model = load_pretrained(kind, config.weights, "a text encoder", **extra)
    tokenizer = load_tokenizer(config.weights)
    if tokenizer.pad_token is None:  # a language model's; whatever stands behind the end is masked
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return SentenceEncoder(model, tokenizer, config, int(facts.hidden_size))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lists of surplus tensors (an unused pooler's) and of layers that no tensor parallelism splits."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_pretrained(kind: Any, weights: str, what: str, **options: Any) -> Any:
    """A transformers model in float32, with every one of its tensors taken from ``weights``.

    Args:
        kind: one of transformers' Auto classes.
        weights: as in a recipe.
        what: the wanted kind in words, for messages.

    Raises:
        WeightsError: not loadable, or tensors are missing (transformers would start those at random).
    """
    path = resolve(weights)
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"'{weights}' cannot be loaded as {what}: {_first_line(error)}",
            "It needs config.json, *.safetensors and a tokenizer in Hugging Face layout.",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(
            f"'{weights}' lacks {len(missing)} tensors that {what} needs, the first '{missing[0]}'.",
            "Name the weights of a complete model of this kind.",
        )
    return model


def load_config(weights: str) -> Any:
    """The transformers configuration of ``weights``.

    Raises:
        ConfigError, WeightsError: as :func:`isthmus.models.weights.resolve`; or it is not readable.
    """
    try:
        return AutoConfig.from_pretrained(resolve(weights), local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"'{weights}' holds no readable config.json: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
