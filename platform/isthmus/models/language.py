"""Frozen causal language models that read a soft prompt: loss for training, captions for inference.

A row is ``[soft prompt ; BOS ; prompt ; caption ; end]``. BOS is there where the model's own tokenizer puts one.
Padding is on the right in training and on the left in generation, masked in both.

Shape letters: B batch, Q soft-prompt tokens, T text tokens, S positions of both, L language-model width, K label
positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import LanguageConfig
from isthmus.contracts import Batch
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.language_base import IGNORED, FrozenLanguage, LossSum, length_groups, total_loss
from isthmus.models.recompute import recompute_layers
from isthmus.models.seq2seq import Seq2SeqLanguageModel, load_t5
from isthmus.models.text import load_config, load_pretrained, load_tokenizer

ensure_torchvision()
from transformers import AutoModelForCausalLM  # noqa: E402

log = logging.getLogger(__name__)

PROBE = 6
"""Tokens that a model is tried with when it is loaded."""
LOGIT_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Accepted difference of two ways to the same logits, as a share of the largest."""


class LanguageModel(FrozenLanguage):
    """A frozen decoder-only model.

    Attributes:
        bos_id: opens a text, or None. first_id: stands before the soft prompt, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, config: LanguageConfig) -> None:
        bos_id, end_id, pad_id = _special_ids(model.config.model_type, tokenizer)
        super().__init__(model, tokenizer, config, end_id, pad_id)
        self.first_id = _first_id(tokenizer, config) if config.opening == "first" else None
        self.bos_id = bos_id if self.first_id is None else None
        self.room()

    # --- training ----------------------------------------------------------------------------------------------

    def token_members(self, texts: Sequence[str], prefixes: Sequence[str] | None = None) -> dict[str, Tensor]:
        assert prefixes is None, "a decoder-only model predicts the whole caption"
        return dict(zip(("ids_BT", "mask_BT", "labels_BT"), self.caption_tokens(texts), strict=True))

    def batch_loss(self, soft_BQL: Tensor, batch: Batch) -> LossSum:
        assert batch.ids_BT is not None and batch.mask_BT is not None and batch.labels_BT is not None
        return self.loss(soft_BQL, batch.ids_BT, batch.mask_BT, batch.labels_BT)

    def caption_tokens(self, texts: Sequence[str], prompt: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`loss` takes, right-padded, int64 [B, T] each: ids, 0/1 mask, labels.

        Labels are -100 on padding and on the prompt with its BOS. Without a prompt a BOS is a label, as in LAVIS: the
        soft prompt's last token predicts it. A caption and its end token take at most ``max_length`` tokens, less BOS
        and prompt where ``max_length_of`` is the text; what is cut off loses the end token, since it does not end
        there, unless the recipe's ``keep_end`` says otherwise.

        Args:
            texts: captions.
            prompt: the recipe's own when None.
        """
        prompt = (self.config.prompt if prompt is None else prompt).strip()
        head, limit = self._prompt_ids(prompt), self.room(prompt)
        ids_BT, mask_BT = self._right_padded(
            [head + self.cut(self.caption_ids(text, prompt), limit, keep_end=False) for text in texts]
        )
        labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
        if prompt:
            labels_BT[:, : len(head)] = IGNORED
        return ids_BT, mask_BT, labels_BT

    def loss(self, prefix_BQL: Tensor, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> LossSum:
        """Next-token cross-entropy over the label positions, summed, in float32.

        Logits are made only where labels are: the vocabulary is the widest axis of the model.

        Args:
            prefix_BQL: soft prompt, Q >= 1.
            ids_BT, mask_BT, labels_BT: see :meth:`caption_tokens`; labels are not shifted.
        """
        prefix_BQL = self._opened(prefix_BQL)
        queries = prefix_BQL.shape[1]
        length_B = mask_BT.sum(1)
        parts = []
        for rows in length_groups(length_B):
            longest = int(length_B[rows].max()) if len(rows) < len(length_B) else ids_BT.shape[1]
            ids, mask, labels = (x[rows, :longest] for x in (ids_BT, mask_BT, labels_BT))
            # Nothing is predicted from the last position, and in a causal model nothing before it sees it.
            hidden = self._hidden(prefix_BQL[rows], ids[:, :-1], mask[:, :-1])[:, queries - 1 :]
            parts.append(self._label_loss(hidden, labels))
        return total_loss(parts)

    def logits(self, hidden_KL: Tensor) -> Tensor:
        """Float32 logits [K, V] of last hidden states, with the scaling and capping that some families add."""
        config = self.model.config
        logits_KV = self.model.get_output_embeddings()(hidden_KL).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits_KV = logits_KV * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits_KV = logits_KV / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits_KV = torch.tanh(logits_KV / cap) * cap
        return logits_KV

    def _opened(self, prefix_BQL: Tensor) -> Tensor:
        """The soft prompt, behind the token that the recipe wants first of all."""
        if self.first_id is None:
            return prefix_BQL
        first_1L = self.embed(torch.tensor([self.first_id], device=prefix_BQL.device)).to(prefix_BQL.dtype)
        return torch.cat([first_1L.expand(len(prefix_BQL), 1, -1), prefix_BQL], 1)

    def _hidden(self, prefix_BQL: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        words_BTL = self.embed(ids_BT)
        inputs_BSL = torch.cat([prefix_BQL.to(words_BTL.dtype), words_BTL], 1)
        mask_BS = torch.cat([mask_BT.new_ones(prefix_BQL.shape[:2]), mask_BT], 1)
        return self.model.base_model(
            inputs_embeds=inputs_BSL, attention_mask=mask_BS, use_cache=False
        ).last_hidden_state

    # --- generation --------------------------------------------------------------------------------------------

    def _generation_inputs(self, prefix_BQL: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        prefix_BQL = self._opened(prefix_BQL)
        inputs_BSL, mask_BS = self._left_padded(prefix_BQL, [self._prompt_ids(prompt) for prompt in prompts])
        return {"inputs_embeds": inputs_BSL, "attention_mask": mask_BS}

    def _left_padded(self, prefix_BQL: Tensor, heads: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Padding, soft prompt, text: the text has to be last, or the model would continue the padding."""
        longest = max(len(head) for head in heads)
        table = self.model.get_input_embeddings().weight
        prefix_BQL = prefix_BQL.to(table.dtype)
        rows, queries = prefix_BQL.shape[:2]
        inputs_BSL = prefix_BQL.new_zeros(rows, queries + longest, self.width)
        mask_BS = torch.zeros(rows, queries + longest, dtype=torch.int64, device=prefix_BQL.device)
        for i, head in enumerate(heads):
            gap = longest - len(head)
            inputs_BSL[i, gap : gap + queries] = prefix_BQL[i]
            if head:
                inputs_BSL[i, gap + queries :] = self.embed(torch.tensor(head, device=prefix_BQL.device))
            mask_BS[i, gap:] = 1
        return inputs_BSL, mask_BS

    # --- tokens ------------------------------------------------------------------------------------------------

    def _prompt_ids(self, prompt: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self._plain_ids(prompt)

    def room(self, prompt: str | None = None) -> int:
        """Tokens that a caption may have with its end token, behind the prompt (the recipe's own when None).

        Raises:
            ConfigError: BOS and prompt leave none of ``max_length``.
        """
        limit = self.config.max_length
        if self.config.max_length_of == "text":
            head = len(self._prompt_ids((self.config.prompt if prompt is None else prompt).strip()))
            if head >= limit:
                raise ConfigError(
                    f"method.language.max_length {limit} counts the text, and the prompt alone takes {head}.",
                    "Raise it, shorten the prompt, or set method.language.max_length_of to 'caption'.",
                )
            limit -= head
        return limit

    def caption_ids(self, text: str, prompt: str | None = None) -> list[int]:
        """Tokens of the caption as they follow the prompt (the recipe's own when None), then the end token; uncut.

        Tokenised together with the prompt, because the space before a word is part of its token.
        """
        prompt = (self.config.prompt if prompt is None else prompt).strip()
        text = text.strip()
        head, whole = self._plain_ids(prompt), self._plain_ids(f"{prompt} {text}" if prompt else text)
        fits = whole[: len(head)] == head
        return [*(whole[len(head) :] if fits else self._plain_ids(text)), self.end_id]


def build_language(config: LanguageConfig, *, bf16: bool = False, recompute: bool = False) -> FrozenLanguage:
    """The frozen language model that ``config`` names, held in float32, or in bfloat16 to train a prompt for it.

    Its own configuration says whether it is decoder-only or a T5. The digest is that of the float32 weights either way.

    Args:
        recompute: gradient checkpointing, layer by layer; see :func:`isthmus.models.recompute.recompute_layers`.

    Raises:
        ConfigError, WeightsError: as :func:`isthmus.models.weights.resolve`; or no language model of these kinds there;
            or see :func:`check_logits`.
    """
    language: FrozenLanguage
    if _is_encoder_decoder(config.weights):
        language = Seq2SeqLanguageModel(load_t5(config), load_tokenizer(config.weights), config)
    else:
        model = load_pretrained(AutoModelForCausalLM, config.weights, "a causal language model")
        language = LanguageModel(model, load_tokenizer(config.weights), config)
        check_logits(language)
    if bf16:
        language.model.to(torch.bfloat16)
        if not torch.cuda.is_available():
            # torch's fused attention in bf16 takes CPUs many times longer
            language.model.set_attn_implementation("eager")
    if recompute and not recompute_layers(language.model):
        log.warning(
            "train.gradient_checkpointing leaves %s as it is: transformers marks none of the layers of a %s.",
            config.weights,
            type(language.model).__name__,
        )
    return language


@torch.no_grad()
def check_logits(language: LanguageModel) -> None:
    """Refuses a model whose logits are not those that this package computes for it.

    The loss takes them from the last hidden states, at label positions alone, and so has to repeat what an architecture
    does to its output layer's values. A few tokens go through both ways.

    Raises:
        WeightsError: the two differ by more than rounding.
    """
    model = language.model
    table = model.get_input_embeddings().weight
    ids_1T = torch.linspace(0, len(table) - 1, PROBE, device=table.device).long().unsqueeze(0)
    training = model.training
    model.eval()
    try:
        whole_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        own_TV = language.logits(
            language._hidden(language.embed(ids_1T[:, :2]), ids_1T[:, 2:], ids_1T[:, 2:] * 0 + 1)[0]
        )
    finally:
        model.train(training)
    tolerance = LOGIT_ROUNDING.get(table.dtype, 1e-4)
    if own_TV.shape == whole_TV.shape:
        difference = float((own_TV - whole_TV).abs().max() / whole_TV.abs().max().clamp(min=1e-30))
        if difference <= tolerance:  # not where it is no number
            return
        found = f"differ by {difference:.2g} of the largest"
    else:
        found = f"have the shape {tuple(own_TV.shape)} instead of {tuple(whole_TV.shape)}"
    raise WeightsError(
        f"'{language.config.weights}' is a {type(model).__name__} ('{model.config.model_type}'), whose logits this "
        f"package does not compute as the model itself does: they {found}.",
        "Name a language model of another architecture.",
    )


def _is_encoder_decoder(weights: str) -> bool:
    try:
        return bool(getattr(load_config(weights), "is_encoder_decoder", False))
    except WeightsError:  # loading it says what is wrong
        return False


def _special_ids(family: str, tokenizer: Any) -> tuple[int | None, int, int]:
    """(BOS or None, end of a caption, padding).

    OPT ends a caption with a newline, as BLIP-2 trained it; every other family with its end-of-sequence token.

    Raises:
        WeightsError: the tokenizer has no token to end with.
    """
    opened = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    bos = bos if bos is not None and opened and opened[0] == bos else None
    end = tokenizer.eos_token_id
    if family == "opt":
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        end = newline[0] if len(newline) == 1 else end
    if end is None:
        raise WeightsError(
            "The language model's tokenizer has no end-of-sequence token.", "Set eos_token in its config."
        )
    pad = tokenizer.pad_token_id
    return bos, int(end), int(end if pad is None else pad)


def _first_id(tokenizer: Any, config: LanguageConfig) -> int:
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            f"method.language.opening is 'first', and {config.weights} has no begin-of-sequence token.",
            "Leave method.language.opening at 'text'.",
        )
    return int(tokenizer.bos_token_id)
