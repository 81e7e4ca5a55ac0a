"""A frozen language model's share of a step, timed on this processor.

Its blocks are many small operations, of which products' rate alone says little: a rotation, a norm or a gate costs its
start and its pass through memory. So a few blocks with random weights run here as the recipe runs them, at the batch's
own shape, forwards and back to their input, and count as often as the model has them; the output layer likewise.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.losses.language import frozen_head_loss
from isthmus.methods.parts import in_parts
from isthmus.models.recompute import recompute_layers
from isthmus.planning.language import Rows
from isthmus.planning.shapes import Language
from isthmus.planning.subject import Subject

ensure_torchvision()
from transformers import AutoModel  # noqa: E402

NAME = "language model"
"""Of the part among those of a step."""
_COLD = 2**26
"""Bytes of weights that a trial cycles through, so that caches do not hold them from one block to the next call."""
_WIDE = 2**27
"""Elements of an output layer's matrix at most: half a gigabyte says as much as more."""
_OPERATIONS = 2e11
"""Of one trial at most; of a larger batch some sequences are taken, of a larger vocabulary some rows."""


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        language: the model. sequences, rows: B and their places, as :class:`isthmus.planning.language.Rows` has them.
        bf16: weights and computation, attention then written out as in training on a processor.
        recompute: gradient checkpointing. again: the whole forward pass once more, as ``train.micro_batch`` asks for.
    """

    language: Language
    sequences: int
    rows: Rows
    bf16: bool = False
    recompute: bool = False
    again: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def seconds(self, rounds: int = 3) -> float:
        """Median seconds of the language model's forward and backward pass, of all sequences together."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._stack_seconds(rounds) + self._head_seconds(rounds)

    def _stack_seconds(self, rounds: int) -> float:
        stack = self.language.decoder
        encoder = self.language.encoder
        layers = stack.layers if encoder is None else (stack.layers + encoder.layers) / 2
        block = (stack.products + (encoder.products if encoder is not None else 0)) / layers
        blocks = max(1, min(math.ceil(layers), math.ceil(_COLD / (block * self.dtype.itemsize))))
        some = self._some(4.0 * block * blocks * (self.rows.read + self.rows.predicted))
        whole, rest = (self._pass(count, some) for count in (blocks, 0))
        seconds = [(_timed(whole), _timed(rest)) for _ in range(rounds + 1)][1:]
        # Masks, rotations and the last norm are made once, whatever the number of blocks.
        once = statistics.median(second for _, second in seconds)
        each = (statistics.median(first for first, _ in seconds) - once) / blocks
        return (once + each * layers) * self.sequences / some

    def _some(self, operations: float) -> int:
        """Sequences of a trial that takes so many operations for each."""
        return max(1, min(self.sequences, int(_OPERATIONS / operations)))

    def _pass(self, blocks: int, sequences: int) -> Callable[[], None]:
        model, rows = self._model(blocks), self.rows
        mask_BS = torch.ones(sequences, rows.read, dtype=torch.int64)
        mask_BS[1:, -1] = 0  # one row is the longest: the others' padding makes the mask that training makes
        inputs = {"decoder_inputs_embeds": self._states(sequences, rows.predicted)} if rows.predicted else {}

        def hidden(soft: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            found = model(inputs_embeds=soft, attention_mask=mask, use_cache=False, **inputs)
            return (found.last_hidden_state,)

        soft_BSL = self._states(sequences, rows.read).requires_grad_()
        slope_BSL = self._states(sequences, rows.predicted or rows.read, self.language.decoder.width)

        def once() -> None:
            soft_BSL.grad = None
            with self._casts():
                (found,) = in_parts(hidden, sequences, soft_BSL, mask_BS) if self.again else hidden(soft_BSL, mask_BS)
            if not found.requires_grad:  # a decoder without blocks reads no encoder
                return
            if found.shape == slope_BSL.shape:
                found.backward(slope_BSL)
            else:  # projected to another width behind the last block, as OPT-350m does
                found.sum().backward()

        return once

    def _model(self, blocks: int) -> nn.Module:
        """``blocks`` of the model's blocks (of each stack), random and frozen, behind a vocabulary of no size."""
        config = copy.deepcopy(self.language.config)
        config.num_hidden_layers = blocks
        if self.language.encoder is not None:
            config.num_decoder_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
        config.vocab_size, config.pad_token_id = 8, 0
        attention = {"attn_implementation": "eager"} if self.bf16 else {}
        model: nn.Module = AutoModel.from_config(config, dtype=self.dtype, **attention).eval().requires_grad_(False)
        if self.recompute:
            recompute_layers(model)
        return model

    def _head_seconds(self, rounds: int) -> float:
        """The output layer and its loss, chunk by chunk as training computes them."""
        width, vocab = self.language.decoder.width, self.language.vocab
        labels = max(1, round(self.sequences * self.rows.labels))
        wide = min(vocab, max(1, _WIDE // width))
        some = max(1, min(labels, int(_OPERATIONS / (4.0 * width * wide))))
        head = nn.Linear(width, wide, bias=False, dtype=self.dtype).requires_grad_(False)
        hidden_KM = self._states(1, some, width)[0].requires_grad_()
        targets_K = torch.randint(wide, (some,))

        def once() -> None:
            hidden_KM.grad = None

            def total(hidden: Tensor) -> tuple[Tensor, ...]:
                return (frozen_head_loss(hidden, targets_K, head, vocab).unsqueeze(0),)

            with self._casts():
                (found,) = in_parts(total, some, hidden_KM) if self.again else total(hidden_KM)
            found.sum().backward()

        seconds = statistics.median([_timed(once) for _ in range(rounds + 1)][1:])
        return seconds * labels / some * vocab / wide

    def _states(self, sequences: int, places: int, width: int = 0) -> Tensor:
        return torch.randn(sequences, places, width or self.language.width).to(self.dtype)

    def _casts(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


def trial_of(subject: Subject, images: int, *, bf16: bool) -> Trial:
    """The trial of a stage 2's language model, of the images of a worker that are held at once."""
    assert subject.language is not None
    train = subject.run.train
    return Trial(
        subject.language, subject.rows(images), subject.language_rows(), bf16, train.gradient_checkpointing,
        train.micro_batch is not None,
    )  # fmt: skip


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
