"""In what two image encoders' sections differ."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.config.parts import VisionConfig


def vision_differences(
    one: VisionConfig, other: VisionConfig, whose: tuple[str, str], *, but: Sequence[str] = ()
) -> str:
    """Settings in which two encoders differ, with both values; "" where in none.

    Args:
        whose: what the two are called.
        but: names of settings that are left out.
    """
    first, second = whose
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in VisionConfig.model_fields if name not in but}
    return ", ".join(f"{name}: {first} {a!r}, {second} {b!r}" for name, (a, b) in pairs.items() if a != b)
