"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section: unknown keys are refused, values are not coerced across kinds ("2" is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class MethodConfig(Config):
    """Base of every method's own options; ``name`` picks the method.

    Attributes:
        least_batch: pairs that a global batch needs for the method's losses to mean anything; a contrast needs two.
    """

    least_batch: ClassVar[int] = 1

    name: str

    @property
    def least_rows(self) -> int:
        """Pairs that each worker's share of a batch needs."""
        return 1
