"""What keeps a figure from standing beside a paper's: weights, data, settings, server.

Counts are those of the published splits; settings are LAVIS's for BLIP-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.config import EvaluateConfig

SPLITS: dict[str, tuple[tuple[str, dict[str, int]], ...]] = {
    "captioning": (("COCO Karpathy test", {"images": 5000, "references": 25010}),),
    "retrieval": (
        ("COCO Karpathy test", {"images": 5000, "captions": 25010}),
        ("COCO Karpathy test, five captions each", {"images": 5000, "captions": 25000}),
        ("Flickr30k test", {"images": 1000, "captions": 5000}),
    ),
    "vqa": (("VQAv2 validation", {"questions": 214354}),),
    "classification": (("ImageNet validation", {"images": 50000, "classes": 1000}),),
    "matching": (),
    "correspondence": (),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "captioning": {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0},
    "retrieval": {"rerank": 128, "text_max_length": 35},
    "vqa": {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0},
    "classification": {},
    "matching": {},
    "correspondence": {},
}


def differences(task: str, facts: Mapping[str, Any], config: EvaluateConfig, unreadable: int) -> list[str]:
    """Why a figure of ``task`` is not comparable to a published one; never empty.

    Args:
        facts: of the task's result: counts and settings.
        unreadable: images that could not be read.
    """
    reasons = ["weights: not verified to be those of a published checkpoint"]
    known = [name for name, counts in SPLITS[task] if all(facts.get(k) == n for k, n in counts.items())]
    counted = ", ".join(
        f"{facts[k]} {k}" for k in ("images", "captions", "references", "questions", "pairs") if k in facts
    )
    if not known:
        reasons.append(f"data: {counted} are no published split")
    elif config.layout is None:
        reasons.append(f"data: {counted}, as many as {known[0]} has, but not read from its own files")
    if config.limit:
        reasons.append(f"data: limited to {config.limit} images")
    if unreadable:
        reasons.append(f"data: {unreadable} images could not be read")
    if task == "vqa":
        reasons.append("server: papers report test-dev or test-std, which EvalAI scores")
    other = [f"{k} {facts.get(k)} (LAVIS: {v})" for k, v in SETTINGS[task].items() if facts.get(k) != v]
    if other:
        reasons.append(f"settings: {', '.join(other)}")
    return reasons
