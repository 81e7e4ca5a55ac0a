"""A frozen causal language model that reads a soft prompt: loss for training, captions for inference.

A row is ``[soft prompt ; BOS ; prompt ; caption ; end]``. BOS is there where the model's own tokenizer puts one.
Padding is on the right in training and on the left in generation, masked in both.

Shape letters: B batch, Q soft-prompt tokens, T text tokens, L language-model width, K label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config.schema import LanguageConfig
from isthmus.contracts import Base
from isthmus.errors import ConfigError, WeightsError
from isthmus.models.freezing import freeze_all, state_digest
from isthmus.models.text import load_pretrained, load_tokenizer

ensure_torchvision()
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

IGNORED = -100


class LossSum(NamedTuple):
    """A sum and what to divide it by, left apart so that the caller can use the count of the global batch.

    Attributes:
        total: float32 scalar, cross-entropy summed over label tokens, in nats.
        tokens: float32 scalar, their number; not differentiable.
    """

    total: Tensor
    tokens: Tensor


class LanguageModel(nn.Module):
    """The frozen model and its tokenizer. No parameter takes a gradient; the soft prompt does.

    ``train()`` changes nothing unless the recipe's ``dropout`` is on: a frozen model's dropout only adds noise.

    Attributes:
        width: L, of the input embeddings (OPT-350m's differs from its hidden width).
        vocab: V, rows of the output layer.
        tokenizer: the transformers tokenizer. base: source and digest of the weights.
        end_id, bos_id: closes a caption; opens a text, or None.
        first_id: stands before the soft prompt, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, config: LanguageConfig) -> None:
        super().__init__()
        freeze_all(model)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.base = Base("language", config.weights, state_digest(model))
        self.width = int(model.get_input_embeddings().embedding_dim)
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        self.bos_id, self.end_id, self.pad_id = _special_ids(model.config.model_type, tokenizer)
        self.first_id = _first_id(tokenizer, config) if config.opening == "first" else None
        if self.first_id is not None:
            self.bos_id = None
        # Sampling defaults that instruct models ship with must not reach our greedy and beam search.
        model.generation_config = GenerationConfig(pad_token_id=self.pad_id, eos_token_id=self._stop_ids())
        self.eval()

    def train(self, mode: bool = True) -> LanguageModel:
        """Stays in eval mode unless the recipe wakes the dropout."""
        return super().train(mode and self.config.dropout)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Input embeddings [B, T, L]."""
        return self.model.get_input_embeddings()(ids_BT)

    def embedding_rms(self) -> float:
        """Root mean square of the input embeddings' elements."""
        with torch.no_grad():
            return float(self.model.get_input_embeddings().weight.float().pow(2).mean().sqrt())

    # --- training ----------------------------------------------------------------------------------------------

    def caption_tokens(self, texts: Sequence[str], prompt: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`loss` takes, right-padded, int64 [B, T] each: ids, 0/1 mask, labels.

        Labels are -100 on padding and on the prompt with its BOS. Without a prompt a BOS is a label, as in LAVIS: the
        soft prompt's last token predicts it. A caption and its end token take at most ``max_length`` tokens; what is
        cut off loses the end token, since it does not end there.

        Args:
            texts: captions.
            prompt: the recipe's own when None.
        """
        prompt = (self.config.prompt if prompt is None else prompt).strip()
        head = self._prompt_ids(prompt)
        rows = [self.caption_ids(text, prompt)[: self.config.max_length] for text in texts]
        longest = len(head) + max((len(row) for row in rows), default=0)
        ids_BT = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
        for i, row in enumerate(rows):
            whole = torch.tensor(head + row, dtype=torch.int64)
            ids_BT[i, : len(whole)], mask_BT[i, : len(whole)] = whole, 1
            labels_BT[i, : len(whole)] = whole
        if prompt:
            labels_BT[:, : len(head)] = IGNORED
        return ids_BT, mask_BT, labels_BT

    def loss(self, prefix_BQL: Tensor, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> LossSum:
        """Next-token cross-entropy over the label positions, summed, in float32.

        Logits are made only where labels are: the vocabulary is the widest axis of the model. With no label at all
        the sum is a differentiable zero, so that every rank runs the same backward.

        Args:
            prefix_BQL: soft prompt, Q >= 1.
            ids_BT, mask_BT, labels_BT: see :meth:`caption_tokens`; labels are not shifted.
        """
        prefix_BQL = self._opened(prefix_BQL)
        queries = prefix_BQL.shape[1]
        hidden_BTL = self._hidden(prefix_BQL, ids_BT, mask_BT)[:, queries - 1 : -1]
        counted_BT = labels_BT != IGNORED
        if not bool(counted_BT.any()):
            return LossSum(hidden_BTL.float().sum() * 0.0, counted_BT.sum().float())
        logits_KV = self.logits(hidden_BTL[counted_BT])
        return LossSum(F.cross_entropy(logits_KV, labels_BT[counted_BT], reduction="sum"), counted_BT.sum().float())

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

    @torch.no_grad()
    def generate(
        self,
        prefix_BQL: Tensor,
        prompt: str | Sequence[str] | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Captions, stripped, without soft prompt and prompt; greedy with one beam, else beam search.

        A row's caption does not depend on what else is in the batch.

        Args:
            prefix_BQL: soft prompt.
            prompt: one for all rows or one each; the recipe's own when None.
            max_new_tokens, min_new_tokens: bounds on generated tokens, not counting the end token in the lower one.
            num_beams: hypotheses kept.
            length_penalty: beam scores are divided by length to this power.

        Raises:
            ConfigError: prompts and rows differ in number.
        """
        rows = prefix_BQL.shape[0]
        if rows == 0:
            return []
        prompts = [self.config.prompt if prompt is None else prompt] * rows if _single(prompt) else list(prompt or ())
        if len(prompts) != rows:
            raise ConfigError(f"{len(prompts)} prompts were given for {rows} images.", "Give one, or one for each.")
        was_training = self.model.training
        self.model.eval()
        try:
            prefix_BQL = self._opened(prefix_BQL)
            inputs_BSL, mask_BS = self._left_padded(prefix_BQL, [self._prompt_ids(str(p).strip()) for p in prompts])
            search = {"length_penalty": length_penalty, "early_stopping": False} if num_beams > 1 else {}
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None, num_beams=num_beams,
                do_sample=False, use_cache=True, pad_token_id=self.pad_id, eos_token_id=self._stop_ids(), **search,
            )  # fmt: skip
            new_BT = self.model.generate(inputs_embeds=inputs_BSL, attention_mask=mask_BS, generation_config=settings)
        finally:
            self.model.train(was_training)
        return [self._decode(row) for row in new_BT.tolist()]

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

    def _decode(self, ids: Sequence[int]) -> str:
        stops = set(self._stop_ids())
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()

    # --- tokens ------------------------------------------------------------------------------------------------

    def _stop_ids(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [self.end_id] if eos is None or eos == self.end_id else [self.end_id, int(eos)]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _prompt_ids(self, prompt: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self._plain_ids(prompt)

    def caption_ids(self, text: str, prompt: str | None = None) -> list[int]:
        """Tokens of the caption as they follow the prompt (the recipe's own when None), then the end token; uncut.

        Tokenised together with the prompt, because the space before a word is part of its token.
        """
        prompt = (self.config.prompt if prompt is None else prompt).strip()
        text = text.strip()
        head, whole = self._plain_ids(prompt), self._plain_ids(f"{prompt} {text}" if prompt else text)
        fits = whole[: len(head)] == head
        return [*(whole[len(head) :] if fits else self._plain_ids(text)), self.end_id]


def build_language(config: LanguageConfig, *, bf16: bool = False) -> LanguageModel:
    """The frozen language model that ``config`` names, held in float32, or in bfloat16 to train a prompt for it.

    The digest is that of the float32 weights either way.

    Raises:
        ConfigError, WeightsError: as :func:`isthmus.models.weights.resolve`; or no causal language model there.
    """
    model = load_pretrained(AutoModelForCausalLM, config.weights, "a causal language model")
    language = LanguageModel(model, load_tokenizer(config.weights), config)
    if bf16:
        model.to(torch.bfloat16)
        if not torch.cuda.is_available():
            model.set_attn_implementation("eager")  # torch's fused attention in bf16 takes CPUs many times longer
    return language


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


def _single(prompt: str | Sequence[str] | None) -> bool:
    return prompt is None or isinstance(prompt, str)
