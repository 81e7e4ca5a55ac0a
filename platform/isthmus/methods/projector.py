"""Frozen encoders, trained projectors, symmetric contrast over the global batch (Maniparambil et al. 2024).

Where the paper's code, freeze-align, contrasts each device's own batch, the batch here is the global one;
``contrast_over: local`` is what that code does.

Shape letters: B batch, N image tokens, D image width, T text tokens, E shared width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from isthmus.config import MethodConfig, TextConfig, VisionConfig
from isthmus.config.bounds import check_range
from isthmus.contracts import Batch, BuildContext, Comm, LossTerms, Reference, Sample, Stage
from isthmus.data.transforms import clean_caption
from isthmus.losses.contrastive import contrast, contrast_reference
from isthmus.losses.held import held
from isthmus.methods.batching import choose_caption, cut_captions, own_tokenizer, stack
from isthmus.methods.parts import SeeingModule, in_parts, seeded
from isthmus.models.noise import batch_keys, number_sites
from isthmus.models.partition import is_partitioned
from isthmus.models.projector import ImageProjector, TextProjector
from isthmus.models.text import SentenceEncoder, build_sentence_encoder
from isthmus.models.vision import build_vision, describe_vision


class ProjectorConfig(MethodConfig):
    """Options of the projector method."""

    least_batch: ClassVar[int] = 2

    name: Literal["projector"] = "projector"
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed: Annotated[int, Field(gt=0)] = Field(512, description="width of the shared image-text space")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    pool: Literal["project-then-pool", "pool-then-project"] = Field(
        "project-then-pool",
        description="pool-then-project averages the frozen image tokens first: fast, another function",
    )
    class_token: bool = Field(False, description="the encoder's first token is a class token, with its own projector")
    text_features: Literal["pooled", "tokens"] = Field("pooled", description="what the text projector reads")
    contrast_over: Literal["global", "local"] = Field(
        "global",
        description="the rows that a row is told apart from: those of all workers, or of its own worker alone, as the "
        "paper's code has it; then another number of workers is another loss",
    )
    itc_gather: Literal["detached", "full"] = "full"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="initial divisor of similarities; learned")
    temperature_range: tuple[float, float] = Field((0.001, 0.5), description="the divisor is held inside on every step")
    remembered_texts: Annotated[int, Field(ge=0)] = Field(
        200_000,
        description="distinct captions whose frozen features each process keeps beside its encoder, a gibibyte of them "
        "at most; 0 where captions hardly come again within so many",
    )

    @property
    def least_rows(self) -> int:
        return 2 if self.contrast_over == "local" else 1

    @model_validator(mode="after")
    def _fits(self) -> ProjectorConfig:
        check_range(self.temperature_range, temperature=self.temperature)
        if self.contrast_over == "local" and self.itc_gather == "detached":
            raise ValueError("contrast_over 'local' gathers nothing, so itc_gather cannot be 'detached'")
        return self


class TextMemory:
    """Frozen text features by caption: the encoder runs once for each distinct one, until the oldest is pushed out.

    Args:
        encoder, comm: what encodes, and what its parts may have to be gathered with.
        capacity: captions that are kept at most; ``most_bytes``: and their features' size.
        per_token: keep token features instead of pooled ones.
    """

    def __init__(
        self, encoder: SentenceEncoder, capacity: int, per_token: bool, comm: Comm, most_bytes: int = 1 << 30
    ) -> None:
        self.encoder, self.capacity, self.per_token, self.comm = encoder, capacity, per_token, comm
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Pooled features [B, D] and None, or token features [B, T, D] (zeros behind the end) and their mask [B, T]."""
        found = {text: self._kept[text] for text in texts if text in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        # Where the encoder lies in parts on all ranks, it runs on all of them or on none.
        together = is_partitioned(self.encoder) and self.comm.max(len(new)) > 0
        if new:
            found |= zip(new, self._encode(new), strict=True)
        elif together:
            self._encode(texts[:1])
        for text, feature in found.items():
            if text not in self._kept:
                self.bytes += feature.nbytes
            self._kept[text] = feature
            self._kept.move_to_end(text)
        while len(self._kept) > self.capacity or self.bytes > self.most_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
        rows = [found[text] for text in texts]
        if not self.per_token:
            return torch.stack(rows), None
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        tokens_BTD = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return tokens_BTD, torch.arange(tokens_BTD.shape[1], device=lengths.device) < lengths.unsqueeze(1)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        ids_BT, mask_BT = self.encoder.tokenize(texts)
        device = next(self.encoder.parameters()).device
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        tokens_BTD, pooled_BD = self.encoder(ids_BT, mask_BT)
        if not self.per_token:
            return [row.clone() for row in pooled_BD]
        return [row[:length].clone() for row, length in zip(tokens_BTD, mask_BT.sum(1).tolist(), strict=True)]


class Projector(SeeingModule):
    """Two frozen encoders, two trained projectors and a temperature.

    Args:
        config: options.
        vision: frozen image encoder, or None.
        image_width: D.
        text: frozen sentence encoder: ``tokenize(texts)``, ``forward(ids, mask) -> (tokens, pooled)``, ``width``.
        comm: collectives.
        seed: of the dropout.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        vision: nn.Module | None,
        image_width: int,
        text: SentenceEncoder,
        comm: Comm,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.comm, self.seed = config, comm, seed
        self.vision, self.text = vision, text
        per_token = config.text_features == "tokens"
        self.image_projector = ImageProjector(
            image_width,
            config.embed,
            config.dropout,
            pool_first=config.pool == "pool-then-project",
            class_token=config.class_token,
        )
        self.text_projector = TextProjector(text.width, config.embed, config.dropout, per_token=per_token)
        # Shape [1], not []: DeepSpeed cannot take a parameter without dimensions.
        self.temperature = nn.Parameter(torch.full((1,), config.temperature))
        self.memory = TextMemory(text, config.remembered_texts, per_token, comm)
        number_sites(self.image_projector, self.text_projector)

    def forward(self, batch: Batch) -> LossTerms:
        temperature = self._held_temperature()
        noise_B = None
        if self.training and self.config.dropout > 0:
            noise_B = batch_keys(self.seed, batch.step, 0, len(batch), self.comm, self.temperature.device)
        found = contrast(
            self._image_vectors(self.image_features(batch), noise_B).unsqueeze(1),
            self._text_vectors(batch.texts, noise_B),
            temperature,
            batch.valid_B,
            self.comm,
            smoothing=self.config.label_smoothing,
            full_gradient=self.config.itc_gather == "full",
            own_rows=self.config.contrast_over == "local",
        )
        metrics = {
            "temperature": temperature.detach()[0],
            "r1_i2t": found.recall_at_1(found.i2t_BG),
            "r1_t2i": found.recall_at_1(found.t2i_BG),
        }
        return LossTerms(found.loss, {"itc": found.loss.detach()}, metrics)

    def bounds(self) -> dict[str, tuple[float, float]]:
        return {"temperature": self.config.temperature_range}

    def _held_temperature(self) -> Tensor:
        return held(self.temperature, *self.config.temperature_range)

    def _image_vectors(self, features_BND: Tensor, noise_B: Tensor | None = None) -> Tensor:
        def vectors(features: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
            return (self.image_projector(features, noise),)

        return F.normalize(self._made(vectors, features_BND, noise_B).float(), dim=-1)

    def _text_vectors(self, texts: Sequence[str], noise_B: Tensor | None = None) -> Tensor:
        features, mask_BT = self.memory.read(texts)

        def vectors(features: Tensor, mask: Tensor | None, noise: Tensor | None) -> tuple[Tensor, ...]:
            return (self.text_projector(features.to(self.temperature.dtype), mask, noise),)

        return F.normalize(self._made(vectors, features, mask_BT, noise_B).float(), dim=-1)

    def _made(self, vectors: Callable[..., tuple[Tensor, ...]], *given: Tensor | None) -> Tensor:
        """Vectors [B, E], with the activations of ``micro_batch`` rows at a time in training."""
        if self.micro_batch is None or not self.training:
            return vectors(*given)[0]
        return in_parts(vectors, self.micro_batch, *given)[0]

    @torch.no_grad()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, 1, E]."""
        return self._image_vectors(features_BND).unsqueeze(1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, E]."""
        return self._text_vectors([clean_caption(text) for text in texts])


class CollateTexts:
    """Samples -> Batch with the chosen captions as text. Picklable."""

    def __init__(self, tokenizer: Any, max_length: int, seed: int) -> None:
        tokenizer = own_tokenizer(tokenizer)
        self.tokenizer, self.max_length, self.seed = tokenizer, max_length, seed

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        texts = tuple(choose_caption(sample, self.seed, epoch) for sample in samples)
        cut_B = cut_captions(texts, self.max_length, lambda text: self.tokenizer(text, verbose=False)["input_ids"])
        return Batch(**stack(samples, step, epoch), texts=texts, cut_B=cut_B)


def references(smoothing: float, groups: int, global_batch: int) -> Mapping[str, Reference]:
    """Chance and floor of the one loss, contrasted in so many ``groups`` of the global batch."""
    return {"itc": contrast_reference(global_batch // groups, smoothing)}


def build(config: ProjectorConfig, context: BuildContext) -> Stage:
    """The stage, from pretrained parts.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    spec = describe_vision(config.vision)
    if config.class_token:
        spec.require_class_token("method.class_token")
    vision = build_vision(config.vision) if context.with_vision else None
    text = build_sentence_encoder(config.text)
    with seeded(context.seed):
        module = Projector(config, vision, spec.width, text, context.comm, context.seed)
    module.micro_batch = context.micro_batch
    groups = context.comm.world_size if config.contrast_over == "local" else 1
    return Stage(
        module=module,
        collate=CollateTexts(text.tokenizer, config.text.max_length, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        references=partial(references, config.label_smoothing, groups),
        bases=tuple(part.base for part in (vision, text) if part is not None),
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
    )
