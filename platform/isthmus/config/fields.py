"""Kinds of field that many sections have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isthmus.config.places import Place

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Of a running mean."""
Precision = Literal["fp32", "bf16", "auto"]
Source = Annotated[str, Place()]
Output = Annotated[str, Place(written=True)]
MaybeOutput = Annotated[str | None, Place(written=True)]
MaybeSource = Annotated[str | None, Place()]
