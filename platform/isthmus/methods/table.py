"""What a method is to the rest of the platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.config import MethodConfig, RunConfig
from isthmus.config.differences import vision_differences
from isthmus.contracts import BuildContext, Stage
from isthmus.errors import ConfigError


def same_method(config: Any, parent: RunConfig | None) -> Any:
    """The ``resolve`` of a method whose parent, if there is one, is an earlier training of the same method.

    Raises:
        ConfigError: the parent is of another method, or reads its images through another encoder.
    """
    if parent is None:
        return config
    if parent.method.name != config.name:
        raise ConfigError(
            f"The parent is a '{parent.method.name}' model, and a '{config.name}' run goes on from none of those.",
            f"Name a '{config.name}' model as parent, or leave parent out.",
        )
    ours: Any = getattr(config, "vision", None)
    theirs: Any = getattr(parent.method, "vision", None)
    # Another size in pixels is what fine-tuning may want; whether the weights are the same, their digest tells.
    if ours is not None and (
        shown := vision_differences(theirs, ours, ("parent", "recipe"), but=("image_size", "weights"))
    ):
        raise ConfigError(
            f"method.vision is another encoder than the parent's ({shown}).",
            "Copy the parent's section 'vision': what it has learnt is of that encoder.",
        )
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
        resolve: fills in what a stage inherits from its parent's recipe, so that the stored recipe builds without it,
            and refuses parents that do not fit.
        survey: fills in what it takes from its data sets (URLs), so that the stored recipe builds without them.
        starts: whether ``build`` itself takes the parent's tensors. Where it does not, all of them are taken over
            (:func:`isthmus.methods.artefact.start_from`).
    """

    config: type[MethodConfig]
    build: Callable[[Any, BuildContext], Stage]
    resolve: Callable[[Any, RunConfig | None], Any] = same_method
    survey: Callable[[Any, Sequence[str]], Any] = take_nothing
    starts: bool = False
