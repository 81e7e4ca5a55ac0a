"""What the methods' modules share: the frozen image encoder's place, its trainable norm, seeded construction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.contracts import Batch, StageModule
from isthmus.errors import ConfigError
from isthmus.models.attention import ImageTokens


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
    """A stage module with a frozen image encoder, or with None where features come from a cache."""

    vision: nn.Module | None

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Frozen image tokens [B, N, D].

        Raises:
            ConfigError: the module was built without its image encoder.
        """
        if self.vision is None:
            raise ConfigError("This model was loaded without its image encoder.", "Load it with with_vision=True.")
        with torch.no_grad():
            return self.vision(pixels_BCHW)

    def image_features(self, batch: Batch) -> Tensor:
        """The batch's image tokens [B, N, D], computed where they were not given."""
        if batch.features_BND is not None:
            return batch.features_BND
        if batch.pixels_BCHW is None:
            raise ValueError("the batch holds neither pixels nor features")
        return self.encode_images(batch.pixels_BCHW)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside depend on ``seed`` alone, and leave the process's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
