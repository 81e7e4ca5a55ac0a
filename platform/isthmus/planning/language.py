"""Rows that a frozen language model sees in stage 2, and bytes that it keeps for its backward pass.

A frozen layer takes no gradient, so its input is not kept: only what its own input's gradient needs. Kept are the
inputs of norms, queries, keys, values and outputs of attention, and what the activations need.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.config import LanguageConfig
from isthmus.planning.activations import FP32, Keeping
from isthmus.planning.shapes import Language, Norm, Stack, Texts

ACTIVATION_COPIES = {"relu": 1, "gelu": 1, "gelu_new": 4, "gated": 3}
"""Tensors of the feed-forward width that an activation keeps: ReLU its result; GELU its input; GELU's approximation by
tanh, written out by transformers, four; a gate its input, its result and what that is multiplied with."""


@dataclass(frozen=True)
class Rows:
    """Places of each sequence, padding included, and label positions of all captions on average.

    Attributes:
        read: of a decoder-only model or a T5's encoder, the soft prompt included.
        predicted: of a T5's decoder; 0 for a decoder-only model.
        labels: of one caption.
    """

    read: int
    predicted: int
    labels: float


def rows_of(config: LanguageConfig, language: Language, queries: int, texts: Texts) -> Rows:
    """What a recipe's captions become.

    A decoder-only model reads the soft prompt and the text up to its last token but one; every token of the caption is
    a label. A T5's prefix is drawn: half of the caption on average, and all of the longest at worst.
    """
    prompt = len(config.prompt.split())  # a word is a token or more; prompts are short
    first = 1 if config.opening == "first" else 0
    if language.encoder is None:
        return Rows(queries + first + prompt + texts.longest - 1, 0, texts.mean)
    if config.prefix == "none":
        return Rows(queries + prompt + 1, texts.longest, texts.mean)
    words = texts.mean - 1
    return Rows(queries + prompt + texts.longest - 1, texts.longest, (words + 1) / 2 + 1)


def bytes_kept(keeping: Keeping, language: Language, sequences: int, rows: Rows, *, recompute: bool = False) -> float:
    """What the language model's forward pass keeps, its output layer included.

    With gradient checkpointing these are the layers' inputs, and one layer as it is recomputed.
    """
    decoder, e = language.decoder, keeping.product
    head = e * sequences * rows.labels * decoder.width  # the gradient of the hidden states, made in the forward pass
    last = _norm(keeping, language.norm, decoder.width)
    if recompute:
        return _inputs_kept(keeping, language, sequences, rows) + head + sequences * (rows.read + rows.predicted) * last
    if language.encoder is None:
        return stack_kept(keeping, language, decoder, sequences, rows.read, 0) + head + sequences * rows.read * last
    encoder = stack_kept(keeping, language, language.encoder, sequences, rows.read, 0)
    inside = stack_kept(keeping, language, decoder, sequences, rows.predicted, rows.read)
    # The decoder's own inputs are constants: the first layer's norm and self-attention keep nothing.
    one = Stack(1, decoder.width, decoder.heads, decoder.inner, 0, 0)
    inside -= sequences * rows.predicted * _norm(keeping, language.norm, decoder.width)
    inside -= _attention(keeping, language, one, sequences, rows.predicted, rows.predicted)
    return encoder + inside + head + sequences * (rows.read + rows.predicted) * last


def _inputs_kept(keeping: Keeping, language: Language, sequences: int, rows: Rows) -> float:
    """Inputs of all layers, and what the largest of them keeps while the backward pass is in it."""
    decoder, e = language.decoder, keeping.product
    stacks = [(decoder, rows.read, 0)]
    if language.encoder is not None:
        stacks = [(language.encoder, rows.read, 0), (decoder, rows.predicted, rows.read)]
    inputs = sum(e * sequences * places * stack.layers * stack.width for stack, places, _ in stacks)
    one = (
        stack_kept(keeping, language, stack, sequences, places, crossed) / stack.layers
        for stack, places, crossed in stacks
    )
    return inputs + max(one)


def stack_kept(keeping: Keeping, language: Language, stack: Stack, sequences: int, places: int, crossed: int) -> float:
    """All layers of one stack.

    Args:
        crossed: places of the encoder that each layer's cross-attention reads; 0 without one.
    """
    rows = sequences * places
    layer = (3 if crossed else 2) * rows * _norm(keeping, language.norm, stack.width)
    layer += _attention(keeping, language, stack, sequences, places, places)
    if crossed:
        layer += _attention(keeping, language, stack, sequences, places, crossed)
    layer += keeping.product * rows * stack.feed_forward * ACTIVATION_COPIES[language.activation]
    return stack.layers * layer


def _norm(keeping: Keeping, norm: Norm, width: int) -> float:
    """For each row: a layer norm's input, which is float32 on an accelerator under autocast; a root-mean-square norm's
    float32 copy; T5's that and the bf16 input."""
    if norm == "layer":
        return (keeping.product if not keeping.cuda else FP32) * width + 2 * FP32
    return FP32 * width + (2 * width if norm == "t5" and keeping.bf16 else 0) + FP32


def _attention(keeping: Keeping, language: Language, stack: Stack, sequences: int, asking: int, asked: int) -> float:
    """Queries, keys and values (keys of shared heads repeated for each), and: where attention is fused, its output and
    the mask, to which a T5 adds its position bias for each head; where it is written out, as transformers does for bf16
    on a processor, the weights, float32 too where the model takes its softmax in that."""
    e = keeping.product
    pairs = sequences * asking * asked
    grids = e * sequences * stack.inner * (asking + 2 * asked)
    if keeping.fused(0.0):
        mask = e * pairs * (stack.heads if language.norm == "t5" else 1)
        return grids + mask + sequences * asking * (e * stack.inner + FP32 * stack.heads)
    return grids + pairs * stack.heads * (e + (FP32 if language.exact_softmax else 0))
