"""Fields that recipes have now and had not before: what a stored recipe without them meant."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CAME_LATER: Mapping[str, Any] = {
    "data.augment": True,
    "data.crop": [0.5, 1.0],
    "data.flip": True,
    "data.rand_augment": None,
    "data.resize": "pillow",
    "data.shuffled_pairs": False,
    "method.language.max_length_of": "caption",
    "method.qformer.compression": None,
    "method.qformer.init_segment": "fold",
    "train.eps": 1e-8,
    "train.gradient_checkpointing": False,
    "train.micro_batch": None,
    "zero.offload_optimizer": "none",
    "zero.offload_parameters": "none",
}
"""Fields with the value that runs before them worked with. With that value they do not count in a run's digest, so that
a run which had finished before still has."""

_COUNTED: Mapping[str, Any] = {"method.qformer.positions": None, "method.vision.options": {}, "train.frozen": []}
_COUNTED_OF: Mapping[str, Mapping[str, Any]] = {"projector": {"method.contrast_over": "global"}}
"""Later fields, of all methods and of one, that have been part of digests ever since: they have to stay, or every run
since then would be another one. Recipes from before them can be read."""


def with_later_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe with the fields that it lacks because they came later, at the values that it worked with."""
    out = copy.deepcopy(dict(recipe))
    method = out.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    for field, value in {**CAME_LATER, **_COUNTED, **_COUNTED_OF.get(str(name), {})}.items():
        *sections, key = field.split(".")
        place: Any = out
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.setdefault(key, copy.deepcopy(value))
    return out
