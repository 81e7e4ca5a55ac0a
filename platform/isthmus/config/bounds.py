"""A learned temperature and the bounds it is held in."""

from __future__ import annotations


def check_range(bounds: tuple[float, float], **temperatures: float) -> None:
    """Raises ValueError where the bounds are not 0 < low < high, or a temperature starts outside of them."""
    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"temperature_range {list(bounds)} is not two numbers above 0, the smaller first")
    for name, value in temperatures.items():
        if not low <= value <= high:
            raise ValueError(f"{name} {value} lies outside temperature_range {list(bounds)}")
