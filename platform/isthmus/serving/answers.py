"""What a model replica answers to the front; plain picklable values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Card:
    """A loaded model.

    Attributes:
        capabilities: any of ``caption-images``, ``take-prompts``, ``answer-questions``, ``embed-images``,
            ``embed-clips``, ``embed-texts``, ``embed-sounds``.
        version: registered version or folder.
        created: seconds since the epoch at which the replica had loaded it.
    """

    capabilities: tuple[str, ...]
    version: str
    created: int


@dataclass(frozen=True)
class Refusal:
    """The client's fault, found only beside the model: an undecodable image, a missing capability."""

    message: str
    code: str


@dataclass(frozen=True)
class Caption:
    """A generated caption.

    Attributes:
        cut: the token budget ended it.
        batch: how many requests shared its forward pass.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut: bool
    batch: int


@dataclass(frozen=True)
class Vector:
    """A unit vector, float32 [E].

    Attributes:
        every: every query's unit vector of an image, [Q, E], where Q > 1.
        tokens: text tokens read; an image counts its query vectors.
    """

    values: np.ndarray
    tokens: int
    every: np.ndarray | None = None
