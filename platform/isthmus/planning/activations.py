"""Bytes that the Q-Former's forward pass keeps for its backward pass.

Counted are the tensors that autograd saves, each storage once: inputs of linear layers, of norms and of GELU, queries,
keys, values and outputs of attention, dropout's masks, log-probabilities. Parameters are not among them; their bf16
copies, which autocast makes and the backward pass reads, are.

Shape letters as in :mod:`isthmus.planning.compute`. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.config import QFormerConfig
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.planning.compute import Pass, crossing_layers, reading, stage1_passes, stage1_uses
from isthmus.planning.shapes import Local

FP32 = 4


@dataclass(frozen=True)
class Keeping:
    """What decides how many bytes an element of a kept tensor takes.

    Attributes:
        bf16: products run in bfloat16 by autocast; norms, softmax and residuals stay float32.
        cuda: on an accelerator attention is fused without dropout; on a processor in float32 alone. Else it is written
            out. Dropout keeps one byte for each element.
    """

    bf16: bool
    cuda: bool

    @property
    def product(self) -> int:
        """Bytes of an element of a product's operands and result."""
        return 2 if self.bf16 else FP32

    def fused(self, dropout: float) -> bool:
        """Whether attention keeps no weights."""
        return not dropout and (self.cuda or not self.bf16)

    def inputs(self, elements: float, readers: int) -> float:
        """What linear layers keep of one float32 input: under autocast each a bf16 copy of its own, else the same."""
        return elements * (2 * readers if self.bf16 else FP32)


def norm(rows: float, width: int) -> float:
    """A layer norm's input, and mean and deviation of each row; float32."""
    return FP32 * rows * (width + 2)


def attended(keeping: Keeping, pairs: float, rows: float, qformer: QFormerConfig) -> float:
    """What attention keeps beside queries, keys and values: its output, and the weights where they exist.

    Args:
        pairs: (asking, asked), of one head. rows: asking ones, padding included.
    """
    H, M, p = qformer.heads, qformer.width, qformer.dropout
    if keeping.fused(p):
        return keeping.product * rows * M + FP32 * rows * H
    softmax = FP32 * pairs * H
    if p:  # the mask, and what it left, of the values' type
        return softmax + (1 + keeping.product) * pairs * H
    return softmax + (2 * pairs * H if keeping.bf16 else 0.0)  # a bf16 copy


def layer(keeping: Keeping, qformer: QFormerConfig, local: Local, rows: Pass, *, crosses: bool, last: bool) -> float:
    """One layer of one pass, from its input to the input of the next; the image's keys and values not counted."""
    M, F, e = qformer.width, qformer.feed_forward, keeping.product
    kept = rows.kept() if last else rows
    into, out = rows.query_rows + rows.text_rows, kept.query_rows + kept.text_rows
    packed = rows.text_rows > 0
    # Self-attention: its input, read by three linear layers; the grids of queries, keys and values.
    total = keeping.inputs(into, 3) * M if kept is rows else keeping.inputs(into, 2) * M + keeping.inputs(out, 1) * M
    keys = rows.sequences * (rows.places + rows.past)
    asking = rows.sequences * kept.places
    total += e * M * (asking + 2 * keys)
    if packed:  # the padded grids are filled by index_copy, whose backward keeps what was copied
        total += e * M * (2 * into + out)
    pairs = float(asking * (rows.places + rows.past))
    total += attended(keeping, pairs, asking, qformer)
    if packed:  # the mask, in the type of the scores where attention is fused
        visible = pairs if rows.past else keys
        total += visible * (e if keeping.fused(qformer.dropout) else 1)
    if packed or not keeping.fused(qformer.dropout):
        total += e * out * M  # the output without padding, as the output layer reads it
    total += _block_end(qformer, out)
    if crosses and kept.query_rows and rows.how is not None:
        total += keeping.inputs(out if not keeping.bf16 else kept.query_rows, 1) * M
        total += _seen(keeping, qformer, local, kept.query_rows, rows)
        total += _block_end(qformer, kept.query_rows)
        total += keeping.inputs(kept.query_rows, 1) * M
        total += keeping.inputs(kept.text_rows, 1) * M if keeping.bf16 else 0.0
    else:
        total += keeping.inputs(out, 1) * M
    # Feed-forward: GELU's input and output.
    return total + 2 * e * out * F + _block_end(qformer, out)


def _block_end(qformer: QFormerConfig, rows: float) -> float:
    """Dropout's mask and the norm of a residual block."""
    return norm(rows, qformer.width) + (rows * qformer.width if qformer.dropout else 0.0)


def _seen(keeping: Keeping, qformer: QFormerConfig, local: Local, query_rows: float, rows: Pass) -> float:
    """Cross-attention up to the input of its output layer."""
    M, H, N, D, e = qformer.width, qformer.heads, local.tokens, local.width, keeping.product
    if rows.how == "projected":
        read = attended(keeping, query_rows * N, query_rows, qformer)
        copy = 0 if keeping.fused(qformer.dropout) else e * query_rows * M
        return e * query_rows * M + read + copy
    weights = query_rows * H * N * (FP32 + (1 + e if qformer.dropout else 0))
    copies = 2 * 2 * rows.sequences * N * D if keeping.bf16 else 0  # of the tokens, for scores and for sums
    return e * query_rows * (2 * M + H * D) + weights + copies


def qformer_pass(
    keeping: Keeping, qformer: QFormerConfig, local: Local, rows: Pass, *, recompute: bool = False
) -> float:
    """All layers of one pass; with gradient checkpointing the layers' inputs, and one layer as it is recomputed."""
    M = qformer.width
    entering = rows.query_rows + rows.text_rows
    end = rows.kept()
    spread = FP32 * (end.query_rows + end.text_rows) * M if end.text_rows else 0.0  # the result as a padded grid
    start = spread + norm(entering, M) + (entering * M if qformer.dropout else 0.0)
    layers = [
        layer(keeping, qformer, local, rows, crosses=i % qformer.cross_every == 0, last=i + 1 == qformer.layers)
        for i in range(qformer.layers)
    ]
    if recompute:
        return start + qformer.layers * FP32 * entering * M + max(layers)
    return start + sum(layers)


def image_memory(keeping: Keeping, qformer: QFormerConfig, local: Local, *, projections: int, matched: bool) -> float:
    """Image tokens, and the keys and values that passes read.

    Args:
        projections: how often images are projected; 0 where blocks read the tokens directly.
        matched: with the matching pass, which reads a copy of three images' keys and values for each of its own.
    """
    C, M, N, D = crossing_layers(qformer), qformer.width, local.tokens, local.width
    tokens = local.images * N * D
    if not projections:
        # Both products of a weight with the norm's scale; under autocast their bf16 copies instead.
        return (0.0 if keeping.bf16 else FP32 * tokens) + keeping.product * 2 * C * M * D
    kept = 2 * C * projections * tokens * 2 if keeping.bf16 else FP32 * tokens * projections
    weights = keeping.product * 2 * C * M * D * projections
    return kept + weights + keeping.product * 2 * C * local.images * N * M * (4 if matched else 1)


def stage1_parts(
    keeping: Keeping, config: Blip2Stage1Config, local: Local, vocab: int, *, recompute: bool = False
) -> dict[str, float]:
    """Bytes by part of a step with all losses that the recipe has."""
    c, B, G = config.qformer, local.images, local.everywhere
    M, Q, E, e = c.width, c.queries, c.embed, keeping.product
    itm, itg = config.weights.itm > 0, config.weights.itg > 0
    how = reading(c, local.tokens, stage1_uses(local.workers, itm))
    projections = 0 if how == "direct" else 2 if itm and local.workers > 1 else 1
    found = {"image keys and values": image_memory(keeping, c, local, projections=projections, matched=itm)}
    if itm and how == "direct":
        found["image keys and values"] += FP32 * 3 * B * local.tokens * local.width * (not keeping.bf16)
    for name, rows in stage1_passes(config, local, how, itm=itm, itg=itg).items():
        found[name] = qformer_pass(keeping, c, local, rows, recompute=recompute)
    # Contrast: what both projections read, the vectors before and after normalising, both tables of similarities of
    # which the largest over the queries is taken.
    heads = keeping.inputs(B * Q + B, 1) * M + FP32 * E * (2 * B * Q + 2 * B + G * Q + G)
    heads += (2 if keeping.bf16 else 0) * E * (B * Q + G * Q)
    heads += e * 2 * B * Q * G + FP32 * 10 * B * G
    if itm:
        heads += keeping.inputs(3 * B * Q, 1) * M
    found["heads"] = heads
    if itg:
        found["caption logits"] = caption_head(keeping, local.labels, M, vocab)
    return found


def stage1_in_parts(
    keeping: Keeping, config: Blip2Stage1Config, local: Local, rows: int, vocab: int, *, recompute: bool = False
) -> dict[str, float]:
    """The same with the activations of ``rows`` images at a time: those of the larger of the two kinds of parts, and
    what all images leave behind."""
    B, G, Q, E, e = local.images, local.everywhere, config.qformer.queries, config.qformer.embed, keeping.product
    held: float = FP32 * E * (B * Q + B + G * Q + G) + e * 2 * B * Q * G + FP32 * 10 * B * G
    held += FP32 * B * local.tokens * local.width if config.weights.itm > 0 else 0.0  # tokens of the negatives' images
    kinds = stage1_kinds(keeping, config, local.part(rows), vocab, recompute=recompute)
    return {"a part of the images": max(kinds), "heads": held}


def stage1_kinds(
    keeping: Keeping, config: Blip2Stage1Config, part: Local, vocab: int, *, recompute: bool = False
) -> tuple[float, float]:
    """Bytes of a part's two kinds: images, texts and captions alone; and the matching's pairs, 0 without ITM."""
    c, rows = config.qformer, part.images
    M, Q, E = c.width, c.queries, c.embed
    itm, itg = config.weights.itm > 0, config.weights.itg > 0
    how = reading(c, part.tokens, 1.0)
    kept = {
        name: qformer_pass(keeping, c, part, one, recompute=recompute)
        for name, one in stage1_passes(config, part, how, itm=itm, itg=itg).items()
    }
    pairs: float = kept.pop("matching pass", 0.0)
    alone = sum(kept.values()) + keeping.inputs(rows * Q + rows, 1) * M + FP32 * E * (rows * Q + rows)
    alone += image_memory(keeping, c, part, projections=int(how == "projected"), matched=False)
    alone += caption_head(keeping, part.labels, M, vocab) if itg else 0.0
    if itm:
        pairs += image_memory(keeping, c, part, projections=2 * (how == "projected"), matched=True)
        pairs += keeping.inputs(3 * rows * Q, 1) * M
        # The negatives' own keys and values, and tokens of own and negatives' images, repeated where they are read.
        pairs += keeping.product * 2 * crossing_layers(c) * rows * part.tokens * M if how == "projected" else 0.0
        pairs += FP32 * 3 * rows * part.tokens * part.width * (how == "direct" and not keeping.bf16)
    return alone, pairs


def caption_head(keeping: Keeping, labels: float, width: int, vocab: int) -> float:
    """ITG's prediction head: two linear inputs, GELU's input, the norm's, and the log-probabilities in float32."""
    inputs = 2 * keeping.inputs(labels, 1) * width
    return inputs + keeping.product * labels * width + norm(labels, width) + FP32 * labels * vocab


def weight_copies(keeping: Keeping, products: int) -> float:
    """bf16 copies of trained weight matrices, which autocast makes once a step and the backward pass reads.

    Args:
        products: elements of all trained matrices.
    """
    return 2.0 * products if keeping.bf16 else 0.0
