"""What a replica asks of its model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.serving.answers import Refusal
from isthmus.serving.replica import LoadedModel, ModelReplica, capabilities


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


class Knowing:
    """Answers from two that it knows."""

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.mean((2, 3))[:, None]

    def answer(self, features_BND: Tensor, questions: Sequence[str]) -> list[str]:
        return [
            "yes" if "any" in text and row.mean() > 0 else "no"
            for row, text in zip(features_BND, questions, strict=True)
        ]


def test_a_model_that_answers_is_asked_and_a_caption_is_refused() -> None:
    replica: Any = object.__new__(ModelReplica)
    replica._name, replica._loaded = "knows", LoadedModel(Knowing(), lambda image: np.asarray(image), "v")
    replica._able = capabilities(replica._loaded.module)
    assert replica._able == ("take-prompts", "answer-questions")
    asked = [(np.full((3, 2, 2), n, np.float32), text, 5) for n, text in [(1, "any cats"), (1, "a cat"), (0, "any")]]
    answers = replica._generate(asked)
    assert [(answer.text, answer.cut, answer.batch) for answer in answers] == [
        ("yes", False, 3), ("no", False, 3), ("no", False, 3)
    ]  # fmt: skip
    refused = asyncio.run(replica.caption(b"", "", 5))
    assert isinstance(refused, Refusal) and "answers questions" in refused.message


def test_a_model_of_pairs_alone_offers_no_vectors() -> None:
    class Pairs(Model):
        contrasts = False

        def embed_images(self, features_BND: Tensor) -> Tensor:
            raise AssertionError

        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            raise AssertionError

    able = capabilities(Pairs())
    assert "caption-images" in able and not any(name.startswith("embed") for name in able)


def test_a_model_without_prompts_refuses_one_before_it_joins_a_batch() -> None:
    """Or one client's text would fail the captions of all who share its batch."""

    class Plain(Model):
        takes_prompt = False

    replica: Any = object.__new__(ModelReplica)
    replica._name, replica._loaded = "plain", LoadedModel(Plain(), lambda image: np.asarray(image), "v")
    replica._able = capabilities(replica._loaded.module)
    assert replica._able == ("caption-images",) and "take-prompts" in capabilities(Model())
    refused = asyncio.run(replica.caption(b"", "what is it", 5))
    assert isinstance(refused, Refusal) and "takes no text" in refused.message
