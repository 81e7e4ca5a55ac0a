"""What a replica asks of its model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.serving.replica import LoadedModel, ModelReplica


class Model:
    """Its recipe has a prompt of its own."""

    own_prompt = "a photo of"

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.mean((2, 3))[:, None]

    def generate(self, features_BND: Tensor, *, prompt: str | None = None, **_: Any) -> list[str]:
        said = self.own_prompt if prompt is None else prompt
        return [f"[{said}] {round(float(row.mean()))}" for row in features_BND]


def test_a_request_without_text_gets_the_recipes_own_prompt() -> None:
    replica: Any = object.__new__(ModelReplica)  # without a deployment around it
    replica._loaded = LoadedModel(Model(), lambda image: np.asarray(image), "v")
    asked = [(np.full((3, 2, 2), n, np.float32), text, 5) for n, text in enumerate(["", "the red", ""])]
    with torch.no_grad():
        answers = [caption.text for caption in replica._generate(asked)]
    assert answers == ["[a photo of] 0", "[the red] 1", "[a photo of] 2"]
