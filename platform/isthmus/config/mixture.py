"""One data set of a training recipe, and the shares of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from isthmus.config.base import Config
from isthmus.config.places import Place

MOST_PARTS = 100_000
"""Largest sum of whole weights: after so many rows the order of a mixture's sets begins again."""


class SetConfig(Config):
    """A data set of a mixture."""

    url: Annotated[str, Place()] = Field(description="URL of an indexed data set")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        description="its share of the samples beside the other sets' weights: 3 and 1 are three samples to one"
    )
    cache: Annotated[str | None, Place()] = Field(
        None, description="URL of its feature cache; needed by placement 'cached'"
    )


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """``weights`` as the smallest whole numbers in the same proportions: 0.5 and 1.25 are 2 and 5.

    Numbers count as they are written, in decimals: 0.1 is a tenth, not the binary fraction nearest to it.

    Raises:
        ValueError: their sum is above :data:`MOST_PARTS`.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > MOST_PARTS:
        rounded = [max(1, round(1000 * weight / sum(whole))) for weight in whole]
        raise ValueError(
            f"in whole numbers the weights are {_ratio(whole)}, whose sum is above {MOST_PARTS}; round them, "
            f"for example to {_ratio(rounded)}"
        )
    return tuple(whole)


def _ratio(numbers: Sequence[int]) -> str:
    return " : ".join(map(str, numbers))
