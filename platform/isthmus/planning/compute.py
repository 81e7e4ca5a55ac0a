"""Floating-point operations of a training step: two for each multiply-add of its matrix products.

Elementwise work (norms, softmax, activations, AdamW) is not in it, as in every published model-FLOPs utilisation.
Attention is counted over the whole padded grid, which is what is computed, and its backward at twice the forward.

Shape letters: B images, G images of all workers, N image tokens, D image width, Q queries, R text rows without padding,
T longest text, M Q-Former width, F its feed-forward width, H heads, E shared width, V vocabulary, K label positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from isthmus.config import QFormerConfig
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.models.attention import CrossAttention
from isthmus.planning.shapes import Language, Local, Stack

Reading = Literal["projected", "direct"]
"""How cross-attention reads image tokens (see :class:`isthmus.models.attention.CrossAttention`)."""


@dataclass(frozen=True)
class Product:
    """One product of a linear layer: [rows, inner] x [inner, outer], or one of its two gradients."""

    rows: int
    inner: int
    outer: int
    kind: Literal["forward", "input", "weight"]

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and of a backward pass.

    Attributes:
        products: how often each product of a linear layer is among them. Attention's are not listed.
    """

    forward: float = 0.0
    backward: float = 0.0
    products: Mapping[Product, float] = field(default_factory=dict, compare=False, repr=False)

    def __add__(self, other: Flops) -> Flops:
        both: Counter[Product] = Counter(self.products)  # type: ignore[arg-type]  # counts of a mean step are no integers
        both.update(other.products)  # type: ignore[arg-type]
        return Flops(self.forward + other.forward, self.backward + other.backward, both)

    def __mul__(self, times: float) -> Flops:
        products = {product: count * times for product, count in self.products.items()}
        return Flops(self.forward * times, self.backward * times, products)

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def recomputed(self) -> Flops:
        """With the forward pass once more in the backward pass."""
        again = {product: count for product, count in self.products.items() if product.kind == "forward"}
        return self + Flops(0.0, self.forward, again)


def linear(rows: float, inner: int, outer: int, *, weight: bool = True, input: bool = True) -> Flops:
    """A product of [rows, inner] with a matrix [inner, outer].

    Args:
        weight, input: whether the backward pass makes their gradients; each costs what the forward costs.
    """
    once = 2.0 * rows * inner * outer
    kinds: list[Literal["forward", "input", "weight"]] = ["forward", *["weight"] * weight, *["input"] * input]  # type: ignore[list-item]
    products = {Product(max(1, round(rows)), inner, outer, kind): 1.0 for kind in kinds}
    return Flops(once, once * (weight + input), products)


def attention(pairs: float, width: int) -> Flops:
    """Scores and weighted sums over ``pairs`` (asking row, asked row), all heads together ``width`` wide."""
    return Flops(4.0 * pairs * width, 8.0 * pairs * width)


def reading(qformer: QFormerConfig, tokens: int, uses: float) -> Reading:
    """The cheaper way, as :meth:`isthmus.models.qformer.QFormer.remember` chooses it."""
    direct = CrossAttention.direct_is_cheaper(qformer.queries, tokens, qformer.width, qformer.heads, uses)
    return "direct" if direct else "projected"


def stage1_uses(workers: int, with_itm: bool) -> float:
    """Passes for each projection of an image (see ``Blip2Stage1``)."""
    return 1.0 if not with_itm else 4.0 if workers == 1 else 2.0


def crossing_layers(qformer: QFormerConfig) -> int:
    """Layers that read the image."""
    return math.ceil(qformer.layers / qformer.cross_every)


def projection(qformer: QFormerConfig, local: Local) -> Flops:
    """Keys and values of all images, once. The frozen encoder's tokens take no gradient."""
    return linear(local.images * local.tokens, local.width, qformer.width, input=False) * (2 * crossing_layers(qformer))


@dataclass(frozen=True)
class Pass:
    """Rows of one pass through the Q-Former.

    Attributes:
        sequences: B, or 3B in the matching pass.
        queries: rows of queries in each sequence, or 0.
        text_rows: R of all sequences. longest: T, or 0.
        how: reading of the image; None where it is not read.
        past: queries whose keys and values come from an earlier pass.
        leading: places of each sequence that the last layer puts out; None for all.
    """

    sequences: int
    queries: int = 0
    text_rows: float = 0.0
    longest: int = 0
    how: Reading | None = None
    past: int = 0
    leading: int | None = None

    @property
    def places(self) -> int:
        return self.queries + self.longest

    @property
    def query_rows(self) -> int:
        return self.sequences * self.queries

    def kept(self) -> Pass:
        """What the last layer puts out."""
        if self.leading is None:
            return self
        queries = min(self.queries, self.leading)
        text = self.leading - queries
        return Pass(self.sequences, queries, float(self.sequences * text), text, self.how, self.past)


def qformer_pass(qformer: QFormerConfig, local: Local, rows: Pass, *, recompute: bool = False) -> Flops:
    """All layers of one pass, without :func:`projection`.

    Args:
        recompute: gradient checkpointing, which runs the forward pass once more in the backward pass.
    """
    M, F = qformer.width, qformer.feed_forward
    total = Flops()
    for i in range(qformer.layers):
        kept = rows.kept() if i + 1 == qformer.layers else rows
        all_rows, out_rows = rows.query_rows + rows.text_rows, kept.query_rows + kept.text_rows
        total += linear(all_rows, M, M) * 2 + linear(out_rows, M, M) * 2
        total += attention(rows.sequences * kept.places * (rows.places + rows.past), M)
        if rows.how is not None and i % qformer.cross_every == 0 and kept.query_rows:
            total += linear(kept.query_rows, M, M) * 2 + _seen(qformer, local, kept.query_rows, rows.how)
        total += linear(out_rows, M, F) + linear(out_rows, F, M)
    return total.recomputed() if recompute else total


def _seen(qformer: QFormerConfig, local: Local, query_rows: float, how: Reading) -> Flops:
    M, H, N, D = qformer.width, qformer.heads, local.tokens, local.width
    if how == "projected":
        return attention(query_rows * N, M)
    # The tokens are constant, so that of scores and sums only the side of the queries is differentiated.
    over_tokens = linear(query_rows * H, D, N, weight=False) + linear(query_rows * H, N, D, weight=False)
    return linear(query_rows, M, D) * 2 + over_tokens + linear(query_rows, M, 1)


def stage1(
    config: Blip2Stage1Config, local: Local, vocab: int, *, recompute: bool = False, micro_batch: int | None = None
) -> dict[str, Flops]:
    """A mean step of stage 1 by part: where ITM or ITG is computed in every k-th step only, in proportion.

    Args:
        vocab: V, rows of the word embeddings.
        micro_batch: images whose activations are held at once; None holds all.
    """
    cycle = math.lcm(config.itm_every, config.itg_every)
    found: dict[str, Flops] = {}
    for step in range(cycle):
        itm = config.weights.itm > 0 and step % config.itm_every == 0
        itg = config.weights.itg > 0 and step % config.itg_every == 0
        parts = stage1_parts(config, local, vocab, itm=itm, itg=itg, recompute=recompute, micro_batch=micro_batch)
        for name, part in parts.items():
            found[name] = found.get(name, Flops()) + part * (1 / cycle)
    return found


def stage1_step(
    config: Blip2Stage1Config,
    local: Local,
    vocab: int,
    *,
    itm: bool = True,
    itg: bool = True,
    recompute: bool = False,
    micro_batch: int | None = None,
) -> Flops:
    """One step of stage 1, with the losses that it computes."""
    itm, itg = itm and config.weights.itm > 0, itg and config.weights.itg > 0
    parts = stage1_parts(config, local, vocab, itm=itm, itg=itg, recompute=recompute, micro_batch=micro_batch)
    return sum(parts.values(), Flops())


def stage1_passes(config: Blip2Stage1Config, local: Local, how: Reading, *, itm: bool, itg: bool) -> dict[str, Pass]:
    """Rows of each pass that a step makes, by name."""
    Q, B, R, T = config.qformer.queries, local.images, local.text_rows, local.longest
    first = 1 if config.qformer.text_pool == "first" else None
    passes = {"image pass": Pass(B, Q, how=how), "text pass": Pass(B, 0, R, T, leading=first)}
    if itm:
        passes["matching pass"] = Pass(3 * B, Q, 3 * R, T, how, leading=Q)
    if itg:
        passes["caption pass"] = Pass(B, 0, R, T, past=Q)
    return passes


def stage1_parts(
    config: Blip2Stage1Config,
    local: Local,
    vocab: int,
    *,
    itm: bool,
    itg: bool,
    recompute: bool,
    micro_batch: int | None = None,
) -> dict[str, Flops]:
    """Operations by part of the step."""
    c = config.qformer
    M, Q, E = c.width, c.queries, c.embed
    part = local.part(min(local.images, micro_batch or local.images))
    # The negatives' images come from other workers as tokens, and are projected there once more. In parts, a part of
    # the images is projected for itself, and it and its negatives for the matching pass.
    projections = (3 if itm else 1) if micro_batch else 2 if itm and local.workers > 1 else 1
    how = reading(c, local.tokens, 1.0 if micro_batch else stage1_uses(local.workers, itm))
    found = {"image keys and values": projection(c, part) * projections} if how == "projected" else {}
    for name, rows in stage1_passes(config, part, how, itm=itm, itg=itg).items():
        found[name] = qformer_pass(c, part, rows, recompute=recompute)
    heads = linear(part.images * Q, M, E) + linear(part.images, M, E)
    if itm:
        heads += linear(3 * part.images * Q, M, 2)
    if itg:
        heads += linear(part.labels, M, M) + linear(part.labels, M, vocab)
    found["heads"] = heads
    if micro_batch:
        found = {name: flops.recomputed() * (local.images / part.images) for name, flops in found.items()}
    pairs = 2.0 * local.images * Q * local.everywhere * E  # similarities of every query to every text
    both = 2 if config.itc_gather == "full" else 1
    found["heads"] += Flops(2 * pairs, 2 * pairs * both)
    return found


def stage2_parts(qformer: QFormerConfig, local: Local, language: Language, *, recompute: bool) -> dict[str, Flops]:
    """Operations of one step of stage 2 by part.

    Args:
        local: its ``longest`` and ``text_rows`` are the decoder's, see :class:`isthmus.planning.language.Rows`.
    """
    how = reading(qformer, local.tokens, 1.0)
    found: dict[str, Flops] = {"image keys and values": projection(qformer, local)} if how == "projected" else {}
    rows = Pass(local.images, qformer.queries, how=how)
    found["image pass"] = qformer_pass(qformer, local, rows, recompute=recompute)
    found["projection"] = linear(rows.query_rows, qformer.width, language.width)
    return found


def frozen_stack(stack: Stack, sequences: int, places: int) -> Flops:
    """Self-attention and feed-forward of a frozen stack; only its input takes a gradient."""
    rows = sequences * places
    # Attention's matrices have the width of all heads, or less; all others are counted as the feed-forward network's.
    narrow = linear(rows, stack.width, stack.inner, weight=False) * (4 * stack.layers)
    wide = linear(rows, stack.width, stack.feed_forward or stack.inner, weight=False)
    total = narrow + wide * ((2.0 * rows * stack.products - narrow.forward) / wide.forward)
    return total + attention(rows * places, stack.inner) * stack.layers


def frozen_language(
    language: Language,
    sequences: int,
    read: int,
    predicted: int,
    labels: float,
    *,
    recompute: bool = False,
    again: bool = False,
) -> Flops:
    """A frozen language model behind a soft prompt, its output layer at label positions.

    Args:
        sequences: B.
        read: places that a decoder-only model or a T5's encoder reads, the soft prompt included.
        predicted: places of a T5's decoder; 0 for a decoder-only model.
        labels: K of all sequences.
        recompute: gradient checkpointing, which makes all but the output layer once more; of each layer not its last
            product, since torch stops when it has what the backward pass reads, and frozen weights read no input.
        again: the whole forward pass once more, in which the output layer's gradient is made as well
            (:func:`isthmus.losses.language.frozen_head_loss`).
    """
    found = _frozen_once(language, sequences, read, predicted, labels)
    head = linear(labels, language.decoder.width, language.vocab, weight=False)
    if again:
        whole = frozen_language(language, sequences, read, predicted, labels, recompute=recompute)
        return whole.recomputed() + Flops(0.0, head.backward)
    if not recompute:
        return found
    more = found.forward - head.forward
    for stack, places in ((language.decoder, predicted or read), (language.encoder, read)):
        if stack is not None:
            more -= 2.0 * sequences * places * stack.layers * stack.width * stack.feed_forward
    return found + Flops(0.0, more)


def _frozen_once(language: Language, sequences: int, read: int, predicted: int, labels: float) -> Flops:
    head = linear(labels, language.decoder.width, language.vocab, weight=False)
    if language.encoder is None:
        return frozen_stack(language.decoder, sequences, read) + head
    decoder = language.decoder
    total = frozen_stack(language.encoder, sequences, read) + frozen_stack(decoder, sequences, predicted) + head
    total += linear(sequences * read, language.cross, 1, weight=False)
    total += attention(sequences * predicted * read, decoder.inner) * decoder.layers
    # The decoder's own inputs are constants, so the first layer's self-attention is not differentiated, nor are the
    # queries of its cross-attention.
    own = Stack(1, decoder.width, decoder.heads, decoder.inner, 0, 4 * decoder.width * decoder.inner)
    spared = frozen_stack(own, sequences, predicted).backward
    spared += 2.0 * sequences * predicted * decoder.inner * (decoder.width + read)
    return total + Flops(0.0, -spared)
