"""Contrast and cross-attention, optimised together (CCACO), between two frozen encoders' token sequences.

Both sides are projected into one space. The contrast pools each side's tokens *before* they meet the other side's: had
pooled vectors been fused with their own partner, they would give the pair away. Cross-attention in both directions then
relates the tokens of a pair. What the method's text leaves open is said in the docstrings as our completion. The model
is in :mod:`~isthmus.methods.co_optimise_model`, its losses in :mod:`~isthmus.methods.co_optimise_objective`; here are
the pairs of modalities, and the assembly.

Shape of the code, for another pair of modalities: a :class:`isthmus.methods.sides.Side` reads a batch as frozen tokens
[B, N, D] with a mask [B, N], and knows its role, width and encoder. :class:`CoOptimise` takes any two, and knows
nothing of images and texts: its :meth:`~CoOptimise.vectors` and :meth:`~CoOptimise.scores` rank what they are given.
A :class:`Pairing` adds what the runtimes ask for (collate function, transforms, sizes) and the module's class, which
implements the contracts by which its kind of pair is evaluated; ``PAIRINGS`` names it. :class:`ImageText` is one.

Shape letters: B batch, G global batch, N tokens of the first side, T of the second, D frozen width, E shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isthmus.contracts import BuildContext, Comm, Reference, Stage
from isthmus.data.transforms import clean_caption
from isthmus.errors import ConfigError
from isthmus.losses.contrastive import contrast_reference
from isthmus.losses.matching import matching_reference
from isthmus.methods.co_optimise_config import CoOptimiseConfig
from isthmus.methods.co_optimise_objective import CoOptimise
from isthmus.methods.heard import CollateClips, FrameSide, SoundSide, clip_transform_of, frozen_tokens
from isthmus.methods.parts import seeded
from isthmus.methods.projector import CollateTexts
from isthmus.methods.sides import ImageSide, Side, TextSide
from isthmus.models.text import build_sentence_encoder
from isthmus.models.vision import build_vision, describe_vision

AUDIO_SEED = 0x5050
"""Sets the start of what is trained in the sides apart from that of the rest."""


class ImageText(CoOptimise):
    """Images and texts, with the contracts by which those are ranked and matched."""

    sides: tuple[ImageSide, TextSide]

    @property
    def memory(self) -> Any:
        """The texts' remembered features."""
        return self.sides[1].memory

    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, 1, E]."""
        return self.vectors(0, self.sides[0].given(features_BND)).unsqueeze(1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, E]."""
        return self.vectors(1, self.sides[1].given([clean_caption(text) for text in texts]))

    def match(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """What re-ranking adds to the cosine, float32 [B]; see :meth:`CoOptimise.scores`."""
        given = self.sides[1].given([clean_caption(text) for text in texts])
        return self.scores(self.sides[0].given(features_BND), given)

    def match_margin(self, features_BND: Tensor, texts: Sequence[str]) -> Tensor:
        """Log-odds of 'these belong together', float32 [B].

        Raises:
            ConfigError: the model was trained without a matching head.
        """
        if self.itm_head is None:
            raise ConfigError(
                "This model has no matching head: it was trained with itm.weight 0.", "Rank with it only."
            )
        return self.match(features_BND, texts)


class Heard(CoOptimise):
    """Clips or images and their sounds, with the contract by which those are ranked."""

    sides: tuple[Any, SoundSide]

    def __init__(self, config: CoOptimiseConfig, first: Side, second: Side, comm: Comm, seed: int) -> None:
        super().__init__(config, first, second, comm, seed)
        self.frames = first.learned if isinstance(first, FrameSide) else None

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Frozen tokens: [B, N, D] of images, [B, T, D] of clips [B, T, 3, H, W].

        Raises:
            ConfigError: the module was built without its image encoder.
        """
        if self.vision is None:
            raise ConfigError("This model was loaded without its image encoder.", "Load it with with_vision=True.")
        return frozen_tokens(self.vision, pixels_BCHW, self.micro_batch)

    @torch.no_grad()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors of images or clips, float32 [B, 1, E]."""
        return self.vectors(0, self.sides[0].given(features_BND)).unsqueeze(1)

    @torch.no_grad()
    def embed_sounds(self, audio_BNF: Tensor, mask_BN: Tensor) -> Tensor:
        """Unit vectors of sounds' patches, float32 [B, E]."""
        return self.vectors(1, self.sides[1].given(audio_BNF, mask_BN))


# ------------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True)
class Pairing:
    """A pair of modalities: its sides, its module, and what the runtimes ask of its data. See :class:`Stage`."""

    first: Side
    second: Side
    module: type[CoOptimise]
    collate: Any
    transform: Any
    augment: Callable[[Any, int], Any]
    image_spec: Mapping[str, int]


def image_text(config: CoOptimiseConfig, context: BuildContext) -> Pairing:
    """Images first, texts second."""
    spec = describe_vision(config.vision)
    text = build_sentence_encoder(config.text)
    return Pairing(
        first=ImageSide(build_vision(config.vision) if context.with_vision else None, spec.width),
        second=TextSide(text, config.remembered_texts, context.comm),
        module=ImageText,
        collate=CollateTexts(text.tokenizer, config.text.max_length, context.seed),
        transform=spec.transform,
        augment=spec.transform.augment,
        image_spec={"tokens": spec.tokens, "width": spec.width, "image_size": spec.image_size},
    )


def heard(config: CoOptimiseConfig, context: BuildContext) -> Pairing:
    """Clips or images first, sounds second."""
    spec = describe_vision(config.vision)
    vision = build_vision(config.vision) if context.with_vision else None
    clips = config.modality == "video-audio"
    with seeded(context.seed ^ AUDIO_SEED):
        first = FrameSide(vision, spec.width, config) if clips else ImageSide(vision, spec.width)
        second = SoundSide(config)
    transform = clip_transform_of(config, spec.transform)
    return Pairing(
        first=first,
        second=second,
        module=Heard,
        collate=CollateClips(),
        transform=transform,
        augment=spec.transform.augment,
        image_spec={
            "tokens": config.frames.count if clips else spec.tokens,
            "width": spec.width,
            "image_size": spec.image_size,
        },
    )


PAIRINGS: dict[str, Callable[[CoOptimiseConfig, BuildContext], Pairing]] = {
    "image-text": image_text,
    "video-audio": heard,
    "image-audio": heard,
}


def references(config: CoOptimiseConfig, global_batch: int) -> Mapping[str, Reference]:
    """Chance and floor of each loss that has them: the literal loss is a norm, and the sums grow with the sides."""
    out: dict[str, Reference] = {}
    if config.alpha > 0:
        out["contrast"] = contrast_reference(global_batch, config.label_smoothing)
    if config.beta > 0 and config.cross.loss == "aligned" and config.cross.reduction == "mean":
        out["cross"] = Reference(2.0 + config.cross.margin)  # attention that says nothing costs 1 a side
    if config.itm.weight > 0:
        out["itm"] = matching_reference()
    return out


def build(config: CoOptimiseConfig, context: BuildContext) -> Stage:
    """The stage, from pretrained parts.

    Raises:
        ConfigError, WeightsError: a part does not exist or does not fit.
    """
    pairing = PAIRINGS[config.modality](config, context)
    with seeded(context.seed):
        module = pairing.module(config, pairing.first, pairing.second, context.comm, context.seed)
    module.micro_batch = context.micro_batch
    encoders: list[Any] = [side.encoder for side in (pairing.first, pairing.second)]
    return Stage(
        module=module,
        collate=pairing.collate,
        transform=pairing.transform,
        augment=pairing.augment,
        references=partial(references, config),
        bases=tuple(encoder.base for encoder in encoders if hasattr(encoder, "base")),
        image_spec=pairing.image_spec,
    )
