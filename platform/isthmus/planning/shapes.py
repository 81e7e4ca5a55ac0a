"""The sizes that a plan is reckoned from: of the frozen parts, of a batch, of its texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Activation = Literal["relu", "gelu", "gelu_new", "gated"]
Norm = Literal["layer", "rms", "t5"]


@dataclass(frozen=True)
class Vision:
    """A frozen image encoder.

    Attributes:
        parameters: all that are held, those of blocks that are not run included.
        tokens, width: N and D of what it gives out.
        image_size: pixels of the square input.
        flops: of one image's forward pass.
        widest: elements of the largest tensor of one image's forward pass.
    """

    parameters: int
    tokens: int
    width: int
    image_size: int
    flops: float
    widest: int


@dataclass(frozen=True)
class Stack:
    """One stack of equal transformer blocks of a language model.

    Attributes:
        layers, width, heads: of the stack.
        inner: width of all heads together.
        feed_forward: width of the feed-forward network.
        products: elements of all weight matrices of the stack, cross-attention's keys and values left out.
    """

    layers: int
    width: int
    heads: int
    inner: int
    feed_forward: int
    products: int


@dataclass(frozen=True)
class Language:
    """A frozen language model.

    Attributes:
        parameters: all of them. vocab: V of the output layer.
        width: of the input embeddings, which the soft prompt has.
        decoder: a decoder-only model's blocks, or a T5's decoder. encoder: a T5's, else None.
        cross: a T5 decoder's weights that multiply the encoder's states.
        activation, norm: kinds, for what they keep for the backward pass.
        exact_softmax: attention, where it is written out, takes its softmax in float32 whatever the precision.
        source: of these sizes. config: transformers' own, from which they are.
    """

    parameters: int
    vocab: int
    width: int
    decoder: Stack
    encoder: Stack | None
    cross: int
    activation: Activation
    norm: Norm
    exact_softmax: bool
    source: str
    config: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Texts:
    """Captions of a batch as tokens, special ones included.

    Attributes:
        mean: tokens of a caption. longest: of a batch's longest, to which the others are padded.
    """

    mean: float
    longest: int


@dataclass(frozen=True)
class Local:
    """One worker's part of a step. B images, G of them over all workers.

    Attributes:
        images: B. workers: W. tokens, width: N and D of the image encoder.
        text_rows: tokens of all captions together, without padding. longest: T.
        labels: positions with a language-model target.
    """

    images: int
    workers: int
    tokens: int
    width: int
    text_rows: float
    longest: int
    labels: float

    @property
    def everywhere(self) -> int:
        """G, images of the global batch."""
        return self.images * self.workers

    def part(self, images: int) -> Local:
        """So many of the images, with their share of the texts."""
        share = images / self.images
        return replace(self, images=images, text_rows=self.text_rows * share, labels=self.labels * share)
