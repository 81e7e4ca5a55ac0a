"""From images to captions or embeddings, one batch at a time.

B images, N image tokens, D vision width, Q query tokens, E shared embedding, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.contracts import Answers, Captions, Embeds, Hears, Sample, Sees, StageModule
from isthmus.data.features import EncodedBy
from isthmus.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """How captions are generated. Beam 1 is greedy; the same settings give the same captions.

    Attributes:
        prompt: "" is none; None is the recipe's own.
    """

    prompt: str | None = None
    max_new_tokens: int = 20
    min_new_tokens: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0


@dataclass(frozen=True)
class Engine:
    """A loaded model on a device.

    Attributes:
        module: the method's module, in eval mode on ``device``.
        transform: PIL image -> float32 [3, H, W].
        name: how the model is called in results, such as ``models:/captioner/3``.
        vision: the frozen image encoder it was trained on; a feature cache must match.
    """

    module: StageModule
    transform: Any
    name: str
    device: str = "cpu"
    vision: EncodedBy = field(default_factory=EncodedBy)

    @torch.inference_mode()
    def features(self, samples: Sequence[Sample]) -> Tensor:
        """The frozen encoder's tokens of a batch, float32 [B, N, D]; cached ones are taken as they are.

        Raises:
            ConfigError: the samples carry pixels and the model was loaded without its image encoder.
        """
        if all(s.features_ND is not None for s in samples):
            features = torch.from_numpy(np.stack([np.asarray(s.features_ND) for s in samples]))
            return features.to(self.device, torch.float32)
        if not isinstance(self.module, Sees):
            raise ConfigError(f"{self.name} holds no image encoder.", "Give 'cache', the URL of a feature cache.")
        pixels = torch.from_numpy(np.stack([np.asarray(s.pixels_CHW) for s in samples]))
        return self.module.encode_images(pixels.to(self.device))

    @torch.inference_mode()
    def caption(self, features_BND: Tensor, how: Generation) -> list[str]:
        """One stripped caption per image; of a model that answers questions, its answer to the prompt.

        Raises:
            ConfigError: the model is of a method that writes no captions, or answers and is asked nothing.
        """
        if isinstance(self.module, Answers):
            if not how.prompt:
                raise ConfigError(
                    f"{self.name} answers questions and writes no captions.",
                    "Ask one of every image: prompt='how many dogs are there?'.",
                )
            return self.module.answer(features_BND, [how.prompt] * len(features_BND))
        if not isinstance(self.module, Captions):
            raise ConfigError(
                f"{self.name} writes no captions.", "Name a model whose method does, such as blip2_stage2."
            )
        return [
            text.strip()
            for text in self.module.generate(
                features_BND,
                prompt=how.prompt,
                max_new_tokens=how.max_new_tokens,
                min_new_tokens=how.min_new_tokens,
                num_beams=how.num_beams,
                length_penalty=how.length_penalty,
            )
        ]

    @property
    def hears(self) -> bool:
        """Whether what it places beside images or clips are sounds, and not texts."""
        return isinstance(self.module, Hears)

    @torch.inference_mode()
    def embed_images(self, features_BND: Tensor) -> Tensor:
        """Unit vectors, float32 [B, Q, E]. Raises ConfigError where the method has no shared space."""
        if isinstance(self.module, Hears):
            return self.module.embed_images(features_BND).float()
        return self._embeds().embed_images(features_BND).float()

    @torch.inference_mode()
    def embed_sounds(self, samples: Sequence[Sample]) -> Tensor:
        """Unit vectors of the samples' sounds, float32 [B, E]; for a model that :attr:`hears`."""
        assert isinstance(self.module, Hears)
        values = torch.from_numpy(np.stack([np.asarray(s.audio_NF) for s in samples])).float()
        mask = torch.from_numpy(np.stack([np.asarray(s.audio_mask_N) for s in samples])).long()
        return self.module.embed_sounds(values.to(self.device), mask.to(self.device)).float()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [B, E]. Raises ConfigError where the method has no shared space."""
        return self._embeds().embed_texts(list(texts)).float()

    def count_tokens(self, texts: Sequence[str]) -> list[int | None]:
        """Tokens of each text in the model's own vocabulary, without special ones; None where it holds no tokenizer."""
        tokenizer = getattr(getattr(self.module, "language", None), "tokenizer", None)
        if tokenizer is None:
            return [None] * len(texts)
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    def require(self, kind: type) -> None:
        """Refuses early, before a cluster of actors finds out.

        Raises:
            ConfigError: the module does not implement ``kind`` of the contracts.
        """
        if not isinstance(self.module, kind):
            verb = {"Captions": "writes no captions", "Embeds": "has no shared image-text space"}.get(kind.__name__, "")
            verb += " (it pairs sounds with what is seen: `isthmus embed` makes their vectors)" if self.hears else ""
            raise ConfigError(f"{self.name} {verb or 'lacks ' + kind.__name__}.", "Name a model of a method that does.")

    def _embeds(self) -> Embeds:
        self.require(Embeds)
        assert isinstance(self.module, Embeds)
        return self.module
