"""A registered model, loaded for scoring.

B images, N image tokens, D vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.config import EvaluateConfig
from isthmus.contracts import ModelVersion, Sample, Sees, StageModule
from isthmus.data.features import EncodedBy
from isthmus.errors import ConfigError


@dataclass(frozen=True)
class Loaded:
    """What scoring needs of a model.

    Attributes:
        version: as the registry resolved it.
        module: in eval mode on ``device``; implements some of Embeds, Matches, Captions, Sees.
        transform: PIL image -> float32 [3, H, W].
        vision: the frozen image encoder it was trained on; a feature cache must match it.
        bases: the frozen parts that it stands on, in words.
    """

    version: ModelVersion
    module: StageModule
    transform: Any
    device: str = "cpu"
    vision: EncodedBy = field(default_factory=EncodedBy)
    bases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """Fixed to a version where the registry knows one."""
        known = self.version
        return f"models:/{known.name}/{known.version}" if known.name and known.version else known.uri

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The frozen encoder's tokens, float32 [B, N, D]; cached ones are taken as they are.

        Raises:
            ConfigError: the samples carry pixels and the model holds no image encoder.
        """
        if all(s.features_ND is not None for s in samples):
            features = torch.from_numpy(np.stack([np.asarray(s.features_ND) for s in samples]))
            return features.to(self.device, torch.float32)
        if not isinstance(self.module, Sees):
            raise ConfigError(f"{self.uri} holds no image encoder.", "Give 'cache', the URL of a feature cache.")
        pixels = torch.from_numpy(np.stack([np.asarray(s.pixels_CHW) for s in samples]))
        return self.module.encode_images(pixels.to(self.device)).float()

    def sounds(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Patches of the samples' sounds, float32 [B, Na, 256], and their mask, int64 [B, Na]."""
        values = torch.from_numpy(np.stack([np.asarray(s.audio_NF) for s in samples]))
        mask = torch.from_numpy(np.stack([np.asarray(s.audio_mask_N) for s in samples]))
        return values.to(self.device, torch.float32), mask.to(self.device).long()

    def require(self, kind: type, task: str) -> None:
        """Refuses a task that the model's method cannot do.

        Raises:
            ConfigError: the module does not implement ``kind`` of the contracts.
        """
        if not isinstance(self.module, kind):
            raise ConfigError(
                f"{self.uri} cannot do {task}: its method implements no {kind.__name__}.",
                "Choose another of 'tasks', or a model whose method can.",
            )


def resolve(config: EvaluateConfig) -> ModelVersion:
    """The model that the recipe names, without loading it.

    Raises:
        RegistryError: no such name, version, alias or folder.
    """
    from isthmus.registry import store

    version: ModelVersion = store.resolve(config.model, config.tracking)
    return version


def load(version: ModelVersion, *, with_vision: bool, gpu: bool | None = None) -> Loaded:
    """The model's module on a GPU where there is one.

    Args:
        gpu: True and False say which it has to be.

    Raises:
        ConfigError: a GPU is asked for, and torch sees none.
    """
    from isthmus.methods.artefact import load_artefact

    if gpu and not torch.cuda.is_available():
        raise ConfigError("gpus_per_worker is set, but torch sees no CUDA device here.", "Set gpus_per_worker to 0.")
    device = "cuda" if gpu or (gpu is None and torch.cuda.is_available()) else "cpu"
    artefact = load_artefact(version.path, with_vision=with_vision, device=device)
    bases = tuple(f"{base.role} {base.weights}" for base in artefact.bases)
    module = artefact.stage.module.to(device).eval()
    return Loaded(version, module, artefact.stage.transform, device, artefact.encoded_by, bases)


@dataclass(frozen=True)
class LoadVersion:
    """Loads one version of a model in any process; picklable.

    Attributes:
        version: as the driver resolved it, fixed to a number where the registry knows one.
    """

    version: ModelVersion
    config: EvaluateConfig

    def __call__(self) -> Loaded:
        version = self.version
        if not Path(version.path).is_dir():  # another node: fetch it here
            from isthmus.registry import store

            fixed = f"models:/{version.name}/{version.version}" if version.name and version.version else version.uri
            version = store.resolve(fixed, self.config.tracking)
        gpu = self.config.gpus_per_worker > 0 if self.config.workers else None  # in this process: where there is one
        return load(version, with_vision=self.config.cache is None, gpu=gpu)
