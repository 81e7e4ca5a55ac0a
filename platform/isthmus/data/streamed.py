"""Frozen image features computed outside the trainer, in actors of their own, while the trainers train.

The actors see what the trainer would have encoded itself: the pixels of one worker's rows of one step, augmented.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from isthmus.config import VisionConfig
from isthmus.contracts import Base, Sample
from isthmus.data.local import LocalRows


@dataclass(frozen=True)
class Encoding:
    """What encodes a worker's images, and where.

    Attributes:
        vision: the frozen encoder.
        bf16: compute under autocast to bfloat16, as the trainer would.
        actors: of one worker.
        cpus, gpus, resources: of one actor; ``resources`` are custom ones, which lead it to the nodes that have them.
        environment: variables to lay over the actor's own.
    """

    vision: VisionConfig
    bf16: bool = False
    actors: int = 1
    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class StepEncoder:
    """The frozen encoder of one process, loaded at its first step.

    Args:
        encoding: which.
        alone: the process has a core or a GPU of its own and is not to take more.
    """

    def __init__(self, encoding: Encoding, *, alone: bool = False) -> None:
        self._encoding, self._alone = encoding, alone
        self._encoder: Any = None

    def __call__(self, local: LocalRows) -> LocalRows:
        """The same rows with ``features_ND`` (float32) in the place of pixels, and the digest of the encoder."""
        encoder = self._loaded()
        pixels = [np.asarray(row.pixels_CHW) for row in local.rows if isinstance(row, Sample)]
        features = iter(self._forward(np.stack(pixels)) if pixels else ())
        rows = tuple(
            replace(row, pixels_CHW=None, features_ND=next(features)) if isinstance(row, Sample) else row
            for row in local.rows
        )
        return replace(local, rows=rows, encoder=encoder.base.digest)

    def _loaded(self) -> Any:
        if self._encoder is None:
            os.environ.update(self._encoding.environment)
            import torch

            from isthmus.models.vision import build_vision

            if self._alone and not self._encoding.gpus:
                torch.set_num_threads(max(1, round(self._encoding.cpus)))
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
            self._encoder = build_vision(self._encoding.vision).to(self._device).eval()
        return self._encoder

    def _forward(self, pixels_BCHW: np.ndarray) -> np.ndarray:
        import torch

        from isthmus.models.vision import encode_pixels

        with torch.inference_mode(), torch.autocast(self._device, torch.bfloat16, enabled=self._encoding.bf16):
            features_BND = encode_pixels(self._encoder, torch.from_numpy(pixels_BCHW).to(self._device))
        out: np.ndarray = features_BND.float().cpu().numpy()
        return out


def encoder_base(vision: VisionConfig, digest: str | None = None) -> Base:
    """The encoder as a recorded base; it is loaded for its digest where that is not known."""
    if digest is None:
        from isthmus.models.vision import build_vision

        digest = build_vision(vision).base.digest
    return Base("vision", vision.weights, digest)
