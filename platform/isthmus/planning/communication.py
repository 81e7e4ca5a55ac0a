"""Bytes that a worker sends in a step, and the time that they add to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.planning.activations import FP32, Keeping
from isthmus.planning.memory import frozen_bytes
from isthmus.planning.subject import Subject


@dataclass(frozen=True)
class Traffic:
    """Bytes that a worker sends in a step.

    Attributes:
        gradients: to reduce them; overlaps the backward pass on accelerators.
        parameters: to put updated or partitioned parameters together.
        losses: vectors, token ids and image tokens that the losses exchange.
    """

    gradients: float
    parameters: float
    losses: float

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.losses


def traffic(subject: Subject, stage: int, images: int, workers: int, keeping: Keeping) -> Traffic:
    """By ring algorithms, in which a worker sends (W - 1) / W of what is reduced or gathered.

    All-reduce is a reduce-scatter and an all-gather, so that ZeRO 0, 1 and 2 send the same; ZeRO 3 gathers the trained
    parameters twice (forward and backward), a frozen language model twice and a frozen image encoder once.
    """
    if workers == 1:
        return Traffic(0.0, 0.0, 0.0)
    ring, trained = (workers - 1) / workers, float(FP32 * subject.trained)
    frozen = frozen_bytes(subject, keeping)
    parameters = trained if stage < 3 else 2 * (trained + frozen.held + frozen.language) + frozen.vision
    return Traffic(trained * ring, parameters * ring, _losses(subject, images, workers))


def _losses(subject: Subject, images: int, workers: int) -> float:
    """Stage 1: vectors to all others (their gradients back where the gather is full), token ids of ITM, and the image
    tokens of its negatives, once each."""
    if subject.language is not None:
        return 0.0
    method = cast(Blip2Stage1Config, subject.run.method)
    q = method.qformer
    others = workers - 1
    vectors = FP32 * q.embed * images * (q.queries + 1) * others * (2 if method.itc_gather == "full" else 1)
    if not method.weights.itm:
        return vectors
    ids = 2 * 8 * images * subject.texts.longest * others
    tokens = FP32 * images * subject.read_tokens * subject.vision.width * others / workers
    return vectors + (ids + tokens) / method.itm_every


def exposed_seconds(moved: Traffic, bandwidth: float, *, backward: float, overlap: bool, stage: int) -> float:
    """Time that communication adds to a step.

    Args:
        bandwidth: bytes/s that a worker sends. backward: seconds of the backward pass.
        overlap: gradients are reduced while the backward pass runs; under ZeRO 3 parameters are fetched ahead too.
    """
    hidden = moved.gradients + (moved.parameters if stage == 3 else 0.0)
    seen = max(0.0, hidden / bandwidth - backward) if overlap else hidden / bandwidth
    return seen + (moved.total - hidden) / bandwidth
