"""Frozen encoder-decoder language models (FLAN-T5) that read a soft prompt: prefix language modelling.

The encoder reads ``[soft prompt ; prompt and prefix ; </s>]``, the decoder predicts ``[suffix ; </s>]``.

Shape letters: B batch, Q soft-prompt tokens, P encoder-side tokens, T label tokens, S = Q + P, L language-model width,
K label positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import LanguageConfig
from isthmus.contracts import Batch
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.language_base import IGNORED, FrozenLanguage, LossSum, length_groups, total_loss
from isthmus.models.text import load_config, load_pretrained
from isthmus.models.weights import read_state, resolve

ensure_torchvision()
from transformers import AutoModelForSeq2SeqLM  # noqa: E402

log = logging.getLogger(__name__)


class Seq2SeqLanguageModel(FrozenLanguage):
    """A frozen T5.

    Attributes:
        start_id: the decoder's first input.
        scale: on the decoder's states before the output layer: d_model^-0.5 where that is the word embeddings
            (T5 v1.0), else 1 (v1.1, FLAN).

    Raises:
        WeightsError: output layer and scaling do not belong together; see :func:`check_head`.
    """

    def __init__(self, model: Any, tokenizer: Any, config: LanguageConfig) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.config.pad_token_id
        if tokenizer.eos_token_id is None or pad is None:
            raise WeightsError(
                "The language model's tokenizer has no end-of-sequence or no padding token.",
                "Set eos_token and pad_token in its config.",
            )
        check_head(model, config.weights)
        start = model.config.decoder_start_token_id
        # Before the base class asks for it.
        self.start_id = int(pad if start is None else start)
        super().__init__(model, tokenizer, config, int(tokenizer.eos_token_id), int(pad))
        self.scale = float(model.config.d_model) ** -0.5 if model.config.scale_decoder_outputs else 1.0
        self.splits = config.prefix == "drawn"

    # --- training ----------------------------------------------------------------------------------------------

    def token_members(self, texts: Sequence[str], prefixes: Sequence[str] | None = None) -> dict[str, Tensor]:
        names = ("ids_BT", "mask_BT", "labels_BT", "prefix_ids_BT", "prefix_mask_BT")
        return dict(zip(names, self.caption_tokens(texts, prefixes=prefixes), strict=True))

    def batch_loss(self, soft_BQL: Tensor, batch: Batch) -> LossSum:
        assert batch.ids_BT is not None and batch.mask_BT is not None and batch.labels_BT is not None
        assert batch.prefix_ids_BT is not None and batch.prefix_mask_BT is not None
        return self.loss(
            soft_BQL, batch.ids_BT, batch.mask_BT, batch.labels_BT, batch.prefix_ids_BT, batch.prefix_mask_BT
        )

    def caption_tokens(
        self, texts: Sequence[str], prompt: str | None = None, prefixes: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`loss` takes, right-padded, int64: label tokens, their 0/1 mask, labels [B, T]; encoder-side
        tokens and their mask [B, P].

        All label tokens with their ``</s>`` take loss; padding is -100. Each side takes at most ``max_length`` tokens.
        The encoder's are cut before their ``</s>``, the labels' too unless the recipe's ``keep_end`` says otherwise.

        Args:
            texts: captions, or suffixes.
            prompt: before the prefix; the recipe's own when None.
            prefixes: one for each text; none when None.
        """
        if prefixes is None:
            prefixes = [""] * len(texts)
        limit = self.config.max_length
        ids_BT, mask_BT = self._right_padded([self.cut(self.caption_ids(text), limit, keep_end=True) for text in texts])
        encoder = [self.prefix_ids(prefix, prompt) for prefix in prefixes]
        encoder = [row if len(row) <= limit else [*row[: limit - 1], self.end_id] for row in encoder]
        prefix_ids_BP, prefix_mask_BP = self._right_padded(encoder)
        return ids_BT, mask_BT, ids_BT.masked_fill(mask_BT == 0, IGNORED), prefix_ids_BP, prefix_mask_BP

    def loss(
        self,
        soft_BQL: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        labels_BT: Tensor,
        prefix_ids_BP: Tensor,
        prefix_mask_BP: Tensor,
    ) -> LossSum:
        """Cross-entropy over the label positions, summed, in float32; see :meth:`caption_tokens` for the arguments.

        The decoder reads the label tokens one place later, behind its start token.
        """
        before_B, length_B = prefix_mask_BP.sum(1), mask_BT.sum(1)
        parts = []
        for rows in length_groups(before_B + length_B):
            whole = len(rows) == len(length_B)
            P = prefix_ids_BP.shape[1] if whole else int(before_B[rows].max())
            T = ids_BT.shape[1] if whole else int(length_B[rows].max())
            ids, mask, labels = (x[rows, :T] for x in (ids_BT, mask_BT, labels_BT))
            inputs, seen = self._encoder_inputs(soft_BQL[rows], prefix_ids_BP[rows, :P], prefix_mask_BP[rows, :P])
            parts.append(self._label_loss(self._hidden(inputs, seen, ids, mask), labels))
        return total_loss(parts)

    def logits(self, hidden_KL: Tensor) -> Tensor:
        """Float32 logits [K, V] of the decoder's last hidden states."""
        if self.scale != 1.0:
            hidden_KL = hidden_KL * self.scale
        logits_KV: Tensor = self.model.lm_head(hidden_KL)
        return logits_KV.float()

    def _encoder_inputs(self, soft_BQL: Tensor, ids_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
        words_BPL = self.embed(ids_BP)
        inputs_BSL = torch.cat([soft_BQL.to(words_BPL.dtype), words_BPL], 1)
        return inputs_BSL, torch.cat([mask_BP.new_ones(soft_BQL.shape[:2]), mask_BP], 1)

    def _hidden(self, inputs_BSL: Tensor, seen_BS: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        memory_BSL = self.model.encoder(inputs_embeds=inputs_BSL, attention_mask=seen_BS).last_hidden_state
        start_B1 = ids_BT.new_full((len(ids_BT), 1), self.start_id)
        hidden_BTL: Tensor = self.model.decoder(
            input_ids=torch.cat([start_B1, ids_BT[:, :-1]], 1),
            attention_mask=mask_BT,
            encoder_hidden_states=memory_BSL,
            encoder_attention_mask=seen_BS,
            use_cache=False,
        ).last_hidden_state
        return hidden_BTL

    # --- generation --------------------------------------------------------------------------------------------

    def _generation_inputs(self, prefix_BQL: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids_BP, mask_BP = self._right_padded([self.prefix_ids("", prompt) for prompt in prompts])
        device = prefix_BQL.device
        inputs_BSL, seen_BS = self._encoder_inputs(prefix_BQL, ids_BP.to(device), mask_BP.to(device))
        return {"inputs_embeds": inputs_BSL, "attention_mask": seen_BS}

    def _generated(self, new_BT: Tensor) -> list[list[int]]:
        return super()._generated(new_BT[:, 1:])  # behind the start token

    def _ends(self) -> dict[str, Any]:
        return {**super()._ends(), "decoder_start_token_id": self.start_id}

    # --- tokens ------------------------------------------------------------------------------------------------

    def caption_ids(self, text: str) -> list[int]:
        """Tokens of a caption or suffix, then ``</s>``; uncut."""
        return [*self._plain_ids(text.strip()), self.end_id]

    def prefix_ids(self, prefix: str, prompt: str | None = None) -> list[int]:
        """What the encoder reads behind the soft prompt: prompt (the recipe's when None), prefix, ``</s>``; uncut."""
        prompt = self.config.prompt if prompt is None else prompt
        return [*self._plain_ids(f"{prompt.strip()} {prefix.strip()}".strip()), self.end_id]


def load_t5(config: LanguageConfig) -> Any:
    """The T5 that ``config`` names, in float32, with the gate's activation that it asks for.

    Raises:
        ConfigError: an encoder-decoder of another family.
        WeightsError: not loadable, or see :func:`check_head`.
    """
    facts = load_config(config.weights)
    if facts.model_type != "t5":
        raise ConfigError(
            f"'{config.weights}' is a '{facts.model_type}' model; of the encoder-decoder models only T5 is known.",
            "Name a T5 (FLAN-T5), or a causal language model.",
        )
    exact = config.t5_activation == "lavis" and facts.is_gated_act and facts.dense_act_fn == "gelu_new"
    if "t5_activation" in config.model_fields_set and config.t5_activation == "lavis" and not facts.is_gated_act:
        log.warning("method.language.t5_activation has no effect: '%s' has no gate.", config.weights)
    options = {"dense_act_fn": "gelu"} if exact else {}
    model = load_pretrained(AutoModelForSeq2SeqLM, config.weights, "an encoder-decoder language model", **options)
    if model.lm_head.weight is model.shared.weight and not facts.scale_decoder_outputs:
        # transformers ties what is missing, and what happens to be equal.
        if "lm_head.weight" not in read_state(resolve(config.weights)):
            raise WeightsError(
                f"'{config.weights}' lacks 'lm_head.weight', and by its config.json the output layer is its own.",
                "Name a complete checkpoint; T5 v1.0, whose output layer is the word embeddings, has "
                "tie_word_embeddings: true.",
            )
        untie_head(model)
    return model


def check_head(model: Any, weights: str) -> None:
    """Refuses an output layer and a scaling that do not belong together.

    T5 v1.0 scales the decoder's states and multiplies with the word embeddings; v1.1 and FLAN have an output matrix of
    their own and do not scale. transformers 5 ties the two whenever a T5 is made from its configuration alone, and the
    matrix that is loaded second then overwrites the first.

    Raises:
        WeightsError: a scaled matrix of its own, or the word embeddings unscaled.
    """
    shared = model.lm_head.weight is model.shared.weight
    scaled = bool(model.config.scale_decoder_outputs)
    if scaled and not torch.equal(model.lm_head.weight, model.shared.weight):
        raise WeightsError(
            f"'{weights}' has an output layer of its own, and its config.json says that it is the word embeddings.",
            "Set tie_word_embeddings: false in its config.json.",
        )
    if shared and not scaled:
        raise WeightsError(
            f"The output layer of '{weights}' is tied to its word embeddings, and by its config.json it is its own.",
            "Give the model its own matrix before its tensors are loaded: isthmus.models.seq2seq.untie_head.",
        )


def untie_head(model: Any) -> None:
    """Gives the output layer a matrix of its own, a copy, so that loading a state dict fills both."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
