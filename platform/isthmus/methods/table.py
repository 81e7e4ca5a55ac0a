"""What a method is to the rest of the platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.config import MethodConfig, RunConfig
from isthmus.contracts import BuildContext, Stage


def keep(config: Any, parent: RunConfig | None) -> Any:  # noqa: ARG001 - the signature of MethodSpec.resolve
    """The ``resolve`` of a method that inherits nothing."""
    return config


def take_nothing(config: Any, urls: Sequence[str]) -> Any:  # noqa: ARG001 - the signature of MethodSpec.survey
    """The ``survey`` of a method whose configuration holds nothing of its data."""
    return config


@dataclass(frozen=True)
class MethodSpec:
    """One alignment method.

    Attributes:
        config: its section of a recipe.
        build: assembles model, objective and data specification.
        resolve: fills in what a stage inherits from its parent's recipe, so that the stored recipe builds without it.
        survey: fills in what it takes from its data sets (URLs), so that the stored recipe builds without them.
    """

    config: type[MethodConfig]
    build: Callable[[Any, BuildContext], Stage]
    resolve: Callable[[Any, RunConfig | None], Any] = keep
    survey: Callable[[Any, Sequence[str]], Any] = take_nothing
