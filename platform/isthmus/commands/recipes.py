"""Recipes on the command line: an optional YAML file, then ``key=value`` words laid over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from isthmus.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.config import Config, RunConfig

C = TypeVar("C", bound="Config")


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides): a first word that is a file or has no ``=`` is the recipe."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return words[0], list(words[1:])
    return None, list(words)


def load(kind: type[C], words: Sequence[str]) -> C:
    """A validated ``kind`` from ``[RECIPE] [key=value ...]``; without a recipe the words alone make it.

    Raises:
        ConfigError: as :func:`isthmus.config.load_config` does.
    """
    from isthmus.config import load_config

    recipe, overrides = split(words)
    return load_config(kind, recipe, overrides, values=None if recipe else {})


def load_training(words: Sequence[str]) -> RunConfig:
    """A validated training recipe from ``RECIPE [key=value ...]``.

    Raises:
        ConfigError: no recipe is named, or as :func:`isthmus.config.load_run` does.
    """
    from isthmus.config import load_run, read_yaml

    recipe, overrides = split(words)
    if recipe is None:
        raise ConfigError("No training recipe is named.", "Example: isthmus train pipelines/demo/stage1.yaml")
    read_yaml(recipe)  # a path that is wrong is told before the seconds that importing the methods takes
    from isthmus.methods import method_configs

    return load_run(recipe, overrides, methods=method_configs())
