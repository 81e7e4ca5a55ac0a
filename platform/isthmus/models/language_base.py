"""What the frozen language models share: their tokenizer's ends, the loss at label positions, generation.

Shape letters: B batch, Q soft-prompt tokens, T text tokens, L language-model width, K label positions, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import LanguageConfig
from isthmus.contracts import Base, Batch
from isthmus.errors import ConfigError
from isthmus.losses.language import IGNORED as IGNORED
from isthmus.losses.language import frozen_head_loss
from isthmus.models.freezing import freeze_all, state_digest
from isthmus.models.partition import is_partitioned

ensure_torchvision()
from transformers import GenerationConfig  # noqa: E402

GROUP_ROWS = 16  # fewer, and reading the weights once more costs what the padding would
MAX_GROUPS = 4


class LossSum(NamedTuple):
    """A sum and what to divide it by, left apart so that the caller can use the count of the global batch.

    Attributes:
        total: float32 scalar, cross-entropy summed over label tokens, in nats.
        tokens: float32 scalar, their number; not differentiable.
    """

    total: Tensor
    tokens: Tensor


class FrozenLanguage(nn.Module):
    """The frozen model and its tokenizer. No parameter takes a gradient; the soft prompt does.

    ``train()`` changes nothing unless the recipe's ``dropout`` is on: a frozen model's dropout only adds noise.

    Attributes:
        width: L, of the input embeddings (OPT-350m's differs from its hidden width).
        vocab: V, rows of the output layer.
        tokenizer: the transformers tokenizer. base: source and digest of the weights.
        end_id: closes a caption; generation stops there and nowhere else. pad_id: fills rows up.
        splits: whether a caption is split into a prefix that is read and a suffix that is predicted.
    """

    splits = False

    def __init__(self, model: Any, tokenizer: Any, config: LanguageConfig, end_id: int, pad_id: int) -> None:
        super().__init__()
        freeze_all(model)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.base = Base("language", config.weights, state_digest(model))
        self.width = int(model.get_input_embeddings().embedding_dim)
        self.vocab = int(model.get_output_embeddings().weight.shape[0])
        self.end_id, self.pad_id = end_id, pad_id
        # Sampling defaults that instruct models ship with must not reach our greedy and beam search.
        model.generation_config = GenerationConfig(**self._ends())
        self.eval()

    def train(self, mode: bool = True) -> FrozenLanguage:
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

    @abstractmethod
    def token_members(self, texts: Sequence[str], prefixes: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The members of a :class:`isthmus.contracts.Batch` that :meth:`batch_loss` reads, with the recipe's prompt.

        Args:
            texts: captions, or their suffixes where ``splits``.
            prefixes: what stands before them; only where ``splits``.
        """

    @abstractmethod
    def batch_loss(self, soft_BQL: Tensor, batch: Batch) -> LossSum:
        """The loss of a batch whose text members :meth:`token_members` made."""

    @abstractmethod
    def caption_ids(self, text: str) -> list[int]:
        """Tokens that a caption, or the suffix of one, has as labels, end token included; uncut."""

    def prefix_ids(self, prefix: str) -> list[int]:
        """Tokens that the model reads for a prefix, the recipe's prompt included; uncut. Only where ``splits``."""
        raise NotImplementedError

    @abstractmethod
    def logits(self, hidden_KL: Tensor) -> Tensor:
        """Float32 logits [K, V] of last hidden states."""

    def room(self) -> int:
        """Tokens that :meth:`caption_ids` may have at most before they are cut, with the recipe's prompt."""
        return self.config.max_length

    def cut(self, ids: list[int], limit: int, keep_end: bool) -> list[int]:
        """At most ``limit`` tokens; what is cut off gives up its last token, or with ``keep_end`` the one before.

        The recipe's ``keep_end``, where it is set, goes first.
        """
        if len(ids) <= limit:
            return ids
        keep_end = keep_end if self.config.keep_end is None else self.config.keep_end
        return [*ids[: limit - 1], ids[-1]] if keep_end else ids[:limit]

    def _right_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and 0/1 mask, int64 [B, T]."""
        longest = max((len(row) for row in rows), default=0)
        ids_BT = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for i, row in enumerate(rows):
            ids_BT[i, : len(row)], mask_BT[i, : len(row)] = torch.tensor(row, dtype=torch.int64), 1
        return ids_BT, mask_BT

    def _label_loss(self, hidden_BTL: Tensor, labels_BT: Tensor) -> LossSum:
        """Cross-entropy where there are labels; position t of both belongs together.

        With no label at all the sum is a differentiable zero, so that every rank runs the same backward. An output
        layer that is spread over ranks is called once, on one row at least: how many labels there are is each rank's
        own affair, and the number of calls must not be.
        """
        counted_BT = labels_BT != IGNORED
        hidden_KL, targets_K, share = hidden_BTL[counted_BT], labels_BT[counted_BT], 1.0
        together = is_partitioned(self.model.get_output_embeddings())
        if not len(hidden_KL):
            if not together:
                return LossSum(hidden_BTL.float().sum() * 0.0, counted_BT.sum().float())
            hidden_KL, targets_K, share = hidden_BTL[:1, 0], labels_BT.new_zeros(1), 0.0
        rows = len(hidden_KL) if together else None
        total = frozen_head_loss(hidden_KL, targets_K, self.logits, self.vocab, rows=rows)
        return LossSum(total * share, counted_BT.sum().float())

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
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Captions, stripped, without soft prompt and prompt; greedy with one beam, else beam search.

        A row's caption does not depend on what else is in the batch.

        Args:
            prefix_BQL: soft prompt.
            prompt: one for all rows or one each; the recipe's own when None.
            max_new_tokens, min_new_tokens: bounds on generated tokens, not counting the end token in the lower one.
            num_beams: hypotheses kept.
            length_penalty: beam scores are divided by length to this power.
            repetition_penalty: logits of tokens that the row has generated are divided by it where positive, else
                multiplied (Keskar et al. 2019); 1 changes nothing. LAVIS's captioning task passes 1.15.

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
            inputs = self._generation_inputs(prefix_BQL, [str(p).strip() for p in prompts])
            search = {"length_penalty": length_penalty, "early_stopping": False} if num_beams > 1 else {}
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None, num_beams=num_beams,
                repetition_penalty=None if repetition_penalty == 1.0 else repetition_penalty,
                do_sample=False, use_cache=True, **self._ends(), **search,
            )  # fmt: skip
            new_BT = self.model.generate(**inputs, generation_config=settings)
        finally:
            self.model.train(was_training)
        return [self._decode(row) for row in self._generated(new_BT)]

    @abstractmethod
    def _generation_inputs(self, prefix_BQL: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What transformers' ``generate`` is called with."""

    def _generated(self, new_BT: Tensor) -> list[list[int]]:
        """The new tokens of every row."""
        rows: list[list[int]] = new_BT.tolist()
        return rows

    def _ends(self) -> dict[str, Any]:
        return {"pad_token_id": self.pad_id, "eos_token_id": self.end_id}

    def _decode(self, ids: Sequence[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token == self.end_id), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def length_groups(length_B: Tensor) -> list[Tensor]:
    """Row numbers in groups of similar length, together every row once.

    On a processor padding costs its full share, so rows run in groups; on an accelerator one call is faster.
    """
    groups = min(MAX_GROUPS, len(length_B) // GROUP_ROWS) if length_B.device.type == "cpu" else 1
    if groups < 2:
        return [torch.arange(len(length_B), device=length_B.device)]
    return list(length_B.argsort(stable=True).chunk(groups))


def total_loss(parts: Sequence[LossSum]) -> LossSum:
    """The sum of sums."""
    return LossSum(torch.stack([p.total for p in parts]).sum(), torch.stack([p.tokens for p in parts]).sum())


def _single(prompt: str | Sequence[str] | None) -> bool:
    return prompt is None or isinstance(prompt, str)
