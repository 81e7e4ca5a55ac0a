"""Pairs of what is seen and what is heard, for the co-optimised method: clips with their sound, images with one.

Shape letters: B batch, T frames, N image tokens, Na patches of a sound, D frozen width, W audio width, E shared width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, Sample
from isthmus.data.clips import ClipTransform
from isthmus.data.spectrum import PATCH_VALUES, ROWS, columns_of
from isthmus.methods.batching import stack
from isthmus.methods.co_optimise_config import CoOptimiseConfig
from isthmus.methods.parts import in_parts
from isthmus.methods.sides import Tokens
from isthmus.models.sequence import SequenceEncoder
from isthmus.models.vision import encode_pixels


class SoundSide:
    """Patches of sounds, read by an encoder that is trained with the rest.

    Args:
        config: the method's options; its section ``audio`` decides the encoder.
    """

    role = "audio"

    def __init__(self, config: CoOptimiseConfig) -> None:
        audio = config.audio
        self.learned = SequenceEncoder(
            PATCH_VALUES, columns_of(audio.seconds), ROWS, width=audio.width, layers=audio.layers, heads=audio.heads
        )
        self.encoder: nn.Module | None = self.learned
        self.width = audio.width

    def read(self, batch: Batch, rows: int | None) -> Tokens:
        """Raises ValueError where the batch holds no sounds."""
        if batch.audio_BNF is None or batch.audio_mask_BN is None:
            raise ValueError("the batch holds no sounds")
        return self.given(batch.audio_BNF, batch.audio_mask_BN, rows)

    def given(self, audio_BNF: Tensor, mask_BN: Tensor, rows: int | None = None) -> Tokens:
        """Tokens of patches; in training their gradient reaches the encoder."""
        return Tokens(_run(self.learned, rows, audio_BNF, mask_BN), mask_BN.bool())


class FrameSide:
    """Frames of clips: a frozen image encoder's patches, averaged in each frame, and an encoder of the sequence.

    Args:
        encoder: frozen, or None where tokens come from a cache.
        width: its D.
        config: the method's options; its section ``frames`` decides the sequence's encoder.
    """

    role = "vision"

    def __init__(self, encoder: nn.Module | None, width: int, config: CoOptimiseConfig) -> None:
        self.encoder, frames = encoder, config.frames
        self.learned = SequenceEncoder(
            width, frames.count, 1, width=frames.width, layers=frames.layers, heads=frames.heads
        )
        self.width = frames.width

    def read(self, batch: Batch, rows: int | None) -> Tokens:
        """Raises ValueError where the batch holds no features, and no pixels that an encoder here could read."""
        if batch.features_BND is not None:
            return self.given(batch.features_BND, rows)
        if batch.pixels_BCHW is None or self.encoder is None:
            raise ValueError("the batch holds no features, and no pixels that an encoder here could read")
        return self.given(frozen_tokens(self.encoder, batch.pixels_BCHW, rows), rows)

    def given(self, features_BTD: Tensor, rows: int | None = None) -> Tokens:
        """Tokens of frames that the frozen encoder has read; in training the sequence's encoder gets its gradient."""
        normal = F.layer_norm(features_BTD.float(), features_BTD.shape[-1:])
        values_BTW = _run(self.learned, rows, normal)
        return Tokens(values_BTW, torch.ones(values_BTW.shape[:2], dtype=torch.bool, device=values_BTW.device))


@torch.no_grad()
def frozen_tokens(encoder: nn.Module, pixels: Tensor, rows: int | None) -> Tensor:
    """[B, N, D] of images, [B, T, D] of clips, ``rows`` samples at a time."""
    return torch.cat([encode_pixels(encoder, part) for part in pixels.split(rows or len(pixels))])


def _run(encoder: nn.Module, rows: int | None, *given: Tensor) -> Tensor:
    if rows is None or not (encoder.training and torch.is_grad_enabled()):
        out: Tensor = encoder(*given)
        return out

    def run(*part: Tensor) -> tuple[Tensor, ...]:
        return (encoder(*part),)

    return in_parts(run, rows, *given)[0]


class CollateClips:
    """Samples -> Batch. Captions play no part; the first of each is kept, to be shown. Picklable."""

    def __call__(self, samples: Sequence[Sample], epoch: int, step: int) -> Batch:
        texts = tuple(sample.captions[0] if sample.captions else sample.key for sample in samples)
        return Batch(**stack(samples, step, epoch), texts=texts)


def clip_transform_of(config: CoOptimiseConfig, image: Any) -> ClipTransform:
    """What turns the samples of a recipe into arrays."""
    modality: Any = config.modality
    return ClipTransform(image, modality, frames=config.frames.count, seconds=config.audio.seconds)
