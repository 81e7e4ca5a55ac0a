"""What a recipe trains and stands on: exact parameter counts, and a step's operations and kept bytes at any batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from isthmus.config import QFormerConfig, RunConfig
from isthmus.contracts import LocalComm, StageModule
from isthmus.errors import ConfigError
from isthmus.losses.language import CHUNK_ELEMENTS
from isthmus.methods import blip2_stage2
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.models.compression import tokens_left
from isthmus.models.freezing import freeze
from isthmus.models.language_base import FrozenLanguage
from isthmus.models.qformer import POSITIONS
from isthmus.planning import activations, compute
from isthmus.planning.activations import FP32, Keeping
from isthmus.planning.compute import Flops
from isthmus.planning.frozen import measure_language, measure_vision, text_sizes
from isthmus.planning.language import Rows, bytes_kept, rows_of
from isthmus.planning.shapes import Language, Local, Texts, Vision


@dataclass(frozen=True)
class Unknown:
    """Sizes of a language model that nothing here knows; see :func:`isthmus.planning.frozen.measure_language`."""

    parameters: float = 0
    width: int = 0
    layers: int = 0


@dataclass(frozen=True)
class Subject:
    """A recipe with its sizes.

    Attributes:
        run: the recipe, what it inherits filled in.
        vision, language: frozen parts; language is None in stage 1.
        trained, held: parameters outside the frozen parts, by whether they are trained (``train.frozen``).
        products: elements of the trained weight matrices, of which autocast makes copies.
        vocab: rows of the Q-Former's word embeddings; 0 in stage 2.
        texts: captions as tokens.
    """

    run: RunConfig
    vision: Vision
    language: Language | None
    trained: int
    held: int
    products: int
    vocab: int
    texts: Texts

    @property
    def qformer(self) -> QFormerConfig:
        method = cast(Blip2Stage1Config, self.run.method)
        return method.qformer

    @property
    def read_tokens(self) -> int:
        """Tokens of an image that the Q-Former reads: the encoder's, or what ``qformer.compression`` leaves of them."""
        return tokens_left(self.vision.tokens, self.qformer.compression)

    @property
    def inline(self) -> bool:
        """Whether the trainer runs the image encoder."""
        return self.run.data.placement == "inline"

    def local(self, images: int, workers: int) -> Local:
        """One worker's part of a batch."""
        rows = images * self.texts.mean
        labels = rows - images  # [DEC] is no target
        return Local(images, workers, self.read_tokens, self.vision.width, rows, self.texts.longest, labels)

    @property
    def plain(self) -> Subject:
        """The recipe without what computes activations twice to hold fewer; itself where it has nothing of the kind."""
        train = self.run.train
        if train.micro_batch is None and not train.gradient_checkpointing:
            return self
        train = train.model_copy(update={"micro_batch": None, "gradient_checkpointing": False})
        return replace(self, run=self.run.model_copy(update={"train": train}))

    def rows(self, images: int) -> int:
        """Images of one worker whose activations are held at once."""
        return min(images, self.run.train.micro_batch or images)

    def parts(self, images: int) -> float:
        """How many such parts a worker's images make."""
        return images / self.rows(images)

    def flops(self, images: int, workers: int) -> dict[str, Flops]:
        """Operations of one worker's mean step by part."""
        local, recompute = self.local(images, workers), self.run.train.gradient_checkpointing
        found: dict[str, Flops] = {}
        if self.inline:
            found["image encoder"] = Flops(self.vision.flops * images)
        if self.language is None:
            method = cast(Blip2Stage1Config, self.run.method)
            return found | compute.stage1(
                method, local, self.vocab, recompute=recompute, micro_batch=self.run.train.micro_batch
            )
        part = local.part(self.rows(images))
        inside = compute.stage2_parts(self.qformer, part, self.language, recompute=recompute)
        again = self.run.train.micro_batch is not None
        if again:
            inside = {name: flops.recomputed() for name, flops in inside.items()}
        rows = self.language_rows()
        inside["language model"] = compute.frozen_language(
            self.language, part.images, rows.read, rows.predicted, part.images * rows.labels, recompute=recompute,
            again=again,
        )  # fmt: skip
        inside = {name: flops * self.parts(images) for name, flops in inside.items()}
        return found | inside

    def language_rows(self) -> Rows:
        """Places of the language model; stage 2 only."""
        method = cast(Blip2Stage2Config, self.run.method)
        assert self.language is not None
        return rows_of(method.language, self.language, self.qformer.queries, self.texts)

    def kept(self, images: int, workers: int, keeping: Keeping) -> dict[str, float]:
        """Bytes that the forward pass keeps for the backward pass, by part; with ``train.micro_batch`` those of the
        images that are held at once, and what stays of the others."""
        local, recompute = self.local(images, workers), self.run.train.gradient_checkpointing
        copies = {"bf16 copies of weights": activations.weight_copies(keeping, self.products)}
        if self.language is None:
            method = cast(Blip2Stage1Config, self.run.method)
            if self.run.train.micro_batch is not None:
                return copies | activations.stage1_in_parts(
                    keeping, method, local, self.rows(images), self.vocab, recompute=recompute
                )
            return activations.stage1_parts(keeping, method, local, self.vocab, recompute=recompute) | copies
        images = self.rows(images)
        local = local.part(images)
        q, how = self.qformer, compute.reading(self.qformer, local.tokens, 1.0)
        rows = compute.Pass(images, q.queries, how=how)
        return {
            "image keys and values": activations.image_memory(
                keeping, q, local, projections=int(how == "projected"), matched=False
            ),
            "image pass": activations.qformer_pass(keeping, q, local, rows, recompute=recompute),
            "projection": keeping.inputs(rows.query_rows, 1) * q.width,
            "language model": bytes_kept(keeping, self.language, images, self.language_rows(), recompute=recompute),
            **copies,
        }

    def ever_kept(self, images: int, workers: int, keeping: Keeping) -> dict[str, float]:
        """Bytes that all forward passes of a step keep, one part of the batch after the other, by part of the model."""
        method, rows = self.run.method, self.rows(images)
        if self.run.train.micro_batch is None or not isinstance(method, Blip2Stage1Config):
            return self.plain.kept(images, workers, keeping)
        part = self.local(images, workers).part(rows)
        kinds = activations.stage1_kinds(keeping, method, part, self.vocab)
        return {"images, texts and pairs": self.parts(images) * sum(kinds)}

    def working(self, images: int, keeping: Keeping) -> float:
        """Bytes that come and go beside what is kept: gradients of logits, of shared weights, of the widest layer."""
        # Autograd adds up what a batch's parts give a weight before it hands the sum over: a second gradient of all.
        added = FP32 * self.trained if self.rows(images) < images else 0
        images = self.rows(images)
        local, q = self.local(images, 1), self.qformer
        if self.language is None:
            method = cast(Blip2Stage1Config, self.run.method)
            logits = 0.0
            if method.weights.itg > 0:
                # First the gradients of logits and log-probabilities. When those and the log-probabilities are gone, a
                # second gradient of all that text passes share: autograd adds up the passes' before it hands one over.
                table = self.vocab * q.width
                shared = q.layers * (4 * q.width**2 + 2 * q.width * q.feed_forward) + table
                # Of a part, the activations are gone before the embeddings' gradients come.
                late = 0 if added else shared + 2 * table - local.labels * self.vocab
                logits = FP32 * max(2 * local.labels * self.vocab, late)
            rows = (3 if method.weights.itm > 0 else 1) * images * (q.queries + self.texts.mean)
            widest, width = q.feed_forward, q.width
        else:
            elements = min(images * self.language_rows().labels * self.language.vocab, CHUNK_ELEMENTS)
            logits = (keeping.product + 3 * FP32) * elements
            rows = float(images * self.language_rows().read)
            widest, width = self.language.decoder.feed_forward, self.language.decoder.width
        return added + max(logits, rows * (2 * keeping.product * widest + 3 * FP32 * width))

    def encoding(self, images: int, keeping: Keeping) -> float:
        """Bytes of the image encoder's forward pass at its widest: the widest tensor before and after its activation,
        and the tokens before and after a block in float32. Nothing else of the step is there at that time."""
        tokens, images = self.vision.tokens * self.vision.width, self.rows(images)
        return images * (2 * keeping.product * self.vision.widest + 2 * FP32 * tokens) if self.inline else 0.0

    def batch_bytes(self, images: int, keeping: Keeping) -> float:
        """The batch itself, and the normalised image tokens that the forward pass holds."""
        pixels = FP32 * 3 * self.vision.image_size**2
        features = self.vision.tokens * self.vision.width
        given = pixels if self.inline else 2 * features  # caches hold float16
        return images * (given + (FP32 * features if keeping.bf16 else 0))


def examine(
    run: RunConfig, texts: Texts, *, parent: RunConfig | None = None, unknown: Unknown | None = None
) -> Subject:
    """The recipe's parts, counted.

    Args:
        texts: captions as tokens; ``longest`` is cut to what the recipe allows.
        parent: recipe of the stage that a stage 2 starts from.
        unknown: sizes of a language model that nothing here knows.

    Raises:
        ConfigError: a method that cannot be planned, or a stage 2 without its parent's recipe.
        WeightsError: frozen parts whose sizes are not known.
    """
    method, unknown = run.method, unknown or Unknown()
    if isinstance(method, Blip2Stage1Config):
        return _examine_stage1(run, method, texts)
    if not isinstance(method, Blip2Stage2Config):
        raise ConfigError(f"A '{method.name}' run cannot be planned.", "Plan a blip2_stage1 or a blip2_stage2 recipe.")
    if parent is None and (method.vision is None or method.qformer is None):
        raise ConfigError(
            "The recipe inherits its image encoder and Q-Former, and a plan reads no registry.",
            "Give the stage-1 recipe: --parent RECIPE.",
        )
    method = blip2_stage2.resolve(method, parent)
    sizes = measure_language(
        method.language.weights, parameters=unknown.parameters, width=unknown.width, layers=unknown.layers
    )
    assert method.vision is not None and method.qformer is not None
    vision = measure_vision(method.vision)
    with torch.device("meta"):
        plain = method.model_copy(update={"projection_init": "linear"})  # the other start reads the embeddings
        module = Blip2Stage2(plain, None, vision.width, cast(FrozenLanguage, _Width(sizes.width)), LocalComm())
    run = run.model_copy(update={"method": method})
    limit = method.language.max_length
    return _counted(run, module, vision, sizes, 0, Texts(min(texts.mean, limit), min(texts.longest, limit)))


def _examine_stage1(run: RunConfig, method: Blip2Stage1Config, texts: Texts) -> Subject:
    vocab, positions = text_sizes(method.text)
    if method.qformer.init is None:
        positions = POSITIONS
    positions = method.qformer.positions or positions
    vision = measure_vision(method.vision)
    with torch.device("meta"):
        module = Blip2Stage1(method, None, vision.width, None, LocalComm(), 0, vocab=vocab, positions=positions)
    limit = method.text.max_length
    return _counted(run, module, vision, None, vocab + 1, Texts(min(texts.mean, limit), min(texts.longest, limit)))


class _Width(nn.Module):
    """Stands where the language model would, which the trained parts ask for nothing but its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def _counted(
    run: RunConfig, module: StageModule, vision: Vision, sizes: Language | None, vocab: int, texts: Texts
) -> Subject:
    freeze(module, run.train.frozen)
    found: Mapping[str, nn.Parameter] = dict(module.named_parameters())
    trained = {name: p for name, p in found.items() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    held = sum(p.numel() for p in found.values()) - count
    return Subject(run, vision, sizes, count, held, matrices(module), vocab, texts)


def matrices(module: nn.Module) -> int:
    """Elements of the trained matrices that products read as they are. The image's keys and values are made from other
    matrices than the parameters, and are counted with the image; positions are looked up."""
    apart = (".cross.key.weight", ".cross.value.weight", "positions.weight")
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad and p.ndim == 2)
    return sum(p.numel() for name, p in trained if not name.endswith(apart))
