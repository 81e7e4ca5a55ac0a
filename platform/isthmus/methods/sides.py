"""The two sides of a pair as frozen tokens: images and texts. Another modality is another :class:`Side`.

Shape letters: B batch, N tokens of a side, D its frozen width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, Comm
from isthmus.methods.projector import TextMemory
from isthmus.models.text import SentenceEncoder


@dataclass(frozen=True)
class Tokens:
    """A frozen encoder's tokens of one side.

    Attributes:
        values_BND: floating point; anything where the mask is False.
        mask_BN: bool, False where a row is padding. Padding stands behind.
    """

    values_BND: Tensor
    mask_BN: Tensor

    def padded(self, length: int) -> Tokens:
        """The same with ``length`` tokens."""
        more = length - self.values_BND.shape[1]
        if not more:
            return self
        return Tokens(F.pad(self.values_BND, (0, 0, 0, more)), F.pad(self.mask_BN, (0, more)))


class Side(Protocol):
    """One modality of the pairs.

    Attributes:
        role: name under which the method's module holds the encoder, e.g. ``vision``; as in Base.role.
        width: D of its tokens.
        encoder: the frozen encoder with its ``base``, or None where its tokens come from a cache.
    """

    role: str
    width: int
    encoder: nn.Module | None

    def read(self, batch: Batch, rows: int | None) -> Tokens:
        """The batch's tokens, without gradient.

        Args:
            rows: samples whose activations are held at once; None is all.
        """
        ...


class ImageSide:
    """A frozen image encoder's tokens, cached or made of pixels; none of them is padding.

    Args:
        encoder: frozen, or None.
        width: D.
    """

    role = "vision"

    def __init__(self, encoder: nn.Module | None, width: int) -> None:
        self.encoder: nn.Module | None = encoder
        self.width = width

    def read(self, batch: Batch, rows: int | None) -> Tokens:
        """Raises ValueError where the batch holds no features and there is nothing to make them of or with."""
        if batch.features_BND is not None:
            return self.given(batch.features_BND)
        if batch.pixels_BCHW is None or self.encoder is None:
            raise ValueError("the batch holds no features, and no pixels that an encoder here could read")
        with torch.no_grad():
            parts = [self.encoder(part) for part in batch.pixels_BCHW.split(rows or len(batch))]
        return self.given(torch.cat(parts))

    def given(self, features_BND: Tensor) -> Tokens:
        """Tokens that were made before."""
        return Tokens(features_BND, torch.ones(features_BND.shape[:2], dtype=torch.bool, device=features_BND.device))


class TextSide:
    """A frozen sentence encoder's tokens of the batch's texts, each distinct text encoded once.

    Args:
        encoder: frozen.
        remembered: distinct texts whose tokens are kept.
        comm: collectives.
    """

    role = "text"

    def __init__(self, encoder: SentenceEncoder, remembered: int, comm: Comm) -> None:
        self.encoder: nn.Module | None = encoder
        self.width = encoder.width
        self.memory = TextMemory(encoder, remembered, True, comm)

    def read(self, batch: Batch, rows: int | None) -> Tokens:  # noqa: ARG002 - the encoder holds no activations
        return self.given(batch.texts)

    def given(self, texts: Sequence[str]) -> Tokens:
        """Tokens of cleaned texts."""
        values_BND, mask_BN = self.memory.read(texts)
        assert mask_BN is not None
        return Tokens(values_BND, mask_BN)
