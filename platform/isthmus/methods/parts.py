"""What the methods' modules share: the frozen image encoder's place, its trainable norm, judged pairs, seeded
construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.config import QFormerConfig, TokenDropConfig
from isthmus.contracts import Batch, Comm, StageModule
from isthmus.errors import ConfigError
from isthmus.models.attention import ImageTokens
from isthmus.models.compression import drop_frozen
from isthmus.models.vision import VisionSpec


class VisionNorm(nn.LayerNorm):
    """The trainable norm on top of the frozen image encoder.

    The statistics are taken in float32 whatever the parameters' type, and carry no gradient into the frozen encoder's
    output; the affine map is handed on beside the tokens (see :class:`isthmus.models.attention.ImageTokens`). eps is
    1e-5, torch's default, which is LAVIS's; Hugging Face's port uses the encoder's 1e-6.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> ImageTokens:  # type: ignore[override]
        """Normalised tokens of ``dtype``, with scale and shift."""
        normal = F.layer_norm(x.float(), self.normalized_shape, eps=self.eps).to(dtype)
        # Products, not the parameters themselves: a sharded parameter is whole only inside this call.
        return ImageTokens(normal, self.weight * 1.0, self.bias * 1.0)


class SeeingModule(StageModule):
    """A stage module with a frozen image encoder, or with None where features come from a cache.

    Attributes:
        micro_batch: rows whose activations are held at once; None is all.
    """

    vision: nn.Module | None
    micro_batch: int | None = None

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Frozen image tokens [B, N, D].

        Raises:
            ConfigError: the module was built without its image encoder.
        """
        if self.vision is None:
            raise ConfigError("This model was loaded without its image encoder.", "Load it with with_vision=True.")
        with torch.no_grad():
            return torch.cat([self.vision(part) for part in pixels_BCHW.split(self.micro_batch or len(pixels_BCHW))])

    def image_features(self, batch: Batch) -> Tensor:
        """The batch's image tokens [B, N, D], computed where they were not given."""
        if batch.features_BND is not None:
            return batch.features_BND
        if batch.pixels_BCHW is None:
            raise ValueError("the batch holds neither pixels nor features")
        return self.encode_images(batch.pixels_BCHW)


def thinned(image: ImageTokens, compression: TokenDropConfig | None) -> ImageTokens:
    """The tokens that a Q-Former reads: all, or what ``compression`` leaves. The affine map that is still to be applied
    commutes with the choice and with the mean of what is dropped."""
    if compression is None:
        return image
    return replace(image, tokens_BND=drop_frozen(image.tokens_BND, compression))


def check_thinning(qformer: QFormerConfig, spec: VisionSpec) -> None:
    """Raises ConfigError where ``qformer.compression`` goes by a class token that the image encoder does not have."""
    if qformer.compression is not None and qformer.compression.class_token:
        spec.require_class_token("method.qformer.compression.class_token")


PAIRS = ("own", "other image", "other text")
"""The pairs of each row that are judged: its own, a wrong image with its text, its image with a wrong text."""


def common_length(batch: Batch, comm: Comm) -> Batch:
    """The batch with its texts padded to the longest of all ranks, so that tokens can be gathered."""
    assert batch.ids_BT is not None and batch.mask_BT is not None
    more = comm.max(batch.ids_BT.shape[1]) - batch.ids_BT.shape[1]
    if not more:
        return batch
    return replace(batch, ids_BT=F.pad(batch.ids_BT, (0, more)), mask_BT=F.pad(batch.mask_BT, (0, more)))


def texts_of(batch: Batch, rows_B: Tensor, comm: Comm) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of global rows; the ranks' texts have a common length. Token ids are small: the whole table
    is gathered, and only image tokens are fetched by row."""
    assert batch.ids_BT is not None and batch.mask_BT is not None
    return comm.gather(batch.ids_BT, grad=False)[rows_B], comm.gather(batch.mask_BT, grad=False)[rows_B]


def image_ids(batch: Batch) -> Tensor:
    """Of the image of each row, int64 [B]; every sample is an image of its own where the data says nothing."""
    return batch.sample_ids_B if batch.image_ids_B is None else batch.image_ids_B


def in_parts(function: Callable[..., tuple[Tensor, ...]], rows: int, *given: Tensor | None) -> tuple[Tensor, ...]:
    """``function`` of some rows at a time, its outputs one below the other.

    Activations are made anew in the backward pass, part by part, so those of one part are all that is ever held. What
    sets rows of different parts against one another then works on the outputs, and its gradients are exact: GradCache
    (Gao et al. 2021), left to autograd.

    Args:
        function: rows of ``given`` -> tensors with a first dimension. It must not call the other ranks.
        rows: of a part.
        given: tensors [B, ...], or None, which is handed on.
    """
    found: list[tuple[Tensor, ...]] = []
    total = next(len(x) for x in given if x is not None)
    for start in range(0, total, rows):
        part = [None if x is None else x[start : start + rows] for x in given]
        found.append(checkpoint(function, *part, use_reentrant=False))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside depend on ``seed`` alone, and leave the process's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
