"""Bytes on one worker by part, under each ZeRO stage (Rajbhandari et al. 2020, section 5).

Parameters, gradients and AdamW's two moments are float32 here, whatever the precision; bf16 is autocast around the
forward pass. Stage 1 shares the moments out among the workers, stage 2 the gradients too, stage 3 the parameters too,
frozen ones included. Below stage 3 every worker holds all frozen parts whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.planning.activations import FP32, Keeping
from isthmus.planning.offload import moved
from isthmus.planning.subject import Subject

STAGES = (0, 1, 2, 3)
BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient buckets at most; of a smaller model as many as it trains (training/zero.py)."""
LIVE = 1_000_000_000
"""Elements of parameters that ZeRO 3 keeps gathered at most (stage3_max_live_parameters, its default)."""
CONTEXT = 1.5 * 2**30
"""CUDA's context, NCCL's and cuBLAS's buffers; assumed."""
CPU_CONTEXT = 0.6 * 2**30
"""A Python process that has imported torch, transformers and DeepSpeed."""
FRAGMENTATION = 0.05
"""Share of activations and working space that the allocator holds and cannot use; assumed."""


@dataclass(frozen=True)
class Frozen:
    """Bytes of the frozen parts, and of trained parameters and those that the recipe holds still."""

    vision: float
    language: float
    held: float

    @property
    def total(self) -> float:
        return self.vision + self.language + self.held


def frozen_bytes(subject: Subject, keeping: Keeping) -> Frozen:
    """The image encoder is held in float32, a language model in bf16 where training computes in it."""
    language = subject.language.parameters * keeping.product if subject.language is not None else 0.0
    return Frozen(FP32 * subject.vision.parameters if subject.inline else 0.0, language, FP32 * subject.held)


def memory(subject: Subject, stage: int, images: int, workers: int, keeping: Keeping) -> dict[str, float]:
    """Bytes by part on one worker's device at the step's peak, which is the end of the forward pass.

    Args:
        stage: of ZeRO. images: of one worker.
    """
    parts = whole_memory(subject, stage, images, workers, keeping)
    return parts | dict.fromkeys(moved(subject, stage, workers, keeping, parts), 0.0)


def whole_memory(subject: Subject, stage: int, images: int, workers: int, keeping: Keeping) -> dict[str, float]:
    """The same as if nothing were offloaded."""
    frozen, trained = frozen_bytes(subject, keeping), float(FP32 * subject.trained)
    share = [1 / workers if stage >= at else 1.0 for at in STAGES]
    kept = sum(subject.kept(images, workers, keeping).values())
    working = subject.working(images, keeping)
    return {
        "image encoder, frozen": frozen.vision * share[3],
        "language model, frozen": frozen.language * share[3],
        "trained parameters": (trained + frozen.held) * share[3],
        "their master copy": trained / workers if stage in (1, 2) else 0.0,
        "gradients": trained * share[2],
        "AdamW's moments": 2 * trained * share[1],
        "gradient buckets": _buckets(subject, stage, keeping),
        "parameters gathered": _gathered(subject, frozen, trained, workers) if stage == 3 else 0.0,
        "batch": subject.batch_bytes(images, keeping),
        "activations kept": kept,
        "working space": working,
        "image encoder's pass, beyond those": max(0.0, subject.encoding(images, keeping) - kept - working),
        "framework": (CONTEXT + FRAGMENTATION * (kept + working)) if keeping.cuda else CPU_CONTEXT,
    }


def _buckets(subject: Subject, stage: int, keeping: Keeping) -> float:
    """Under ZeRO 1 and 2 two buckets, since reduction overlaps the backward pass on accelerators; one under ZeRO 3."""
    used = float(FP32 * min(subject.trained, BUCKET))
    return 2 * used if keeping.cuda and stage in (1, 2) else used


def _gathered(subject: Subject, frozen: Frozen, trained: float, workers: int) -> float:
    """What ZeRO 3 puts together again beside its own share: as much as it may, which is all of a small model."""
    parameters = subject.trained + subject.held + subject.vision.parameters * subject.inline
    parameters += subject.language.parameters if subject.language is not None else 0
    return (frozen.total + trained) * min(1.0, LIVE / parameters) * (1 - 1 / workers)


def largest_images(subject: Subject, stage: int, workers: int, keeping: Keeping, room: float) -> int:
    """The most images a worker can take in ``room`` bytes; 0 where not even one fits."""

    def fits(images: int) -> bool:
        return sum(memory(subject, stage, images, workers, keeping).values()) <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
