"""Relative paths in a recipe, made absolute before the recipe leaves this process.

Ray's workers have working directories of their own, so a relative path means nothing to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from isthmus.config.base import Config
from isthmus.errors import ConfigError

C = TypeVar("C", bound=Config)

_NAMED = ("random", "timm")
_SCHEMES = ("models:/", "pkg:", "hf:")
_JOB_SCRATCH = "runtime_resources/working_dir_files"
"""Part of the folder that Ray unpacks a submitted job's files into, and deletes after the job."""


@dataclass(frozen=True)
class Place:
    """Marks a field, in ``Annotated``, whose text (or whose values, in a mapping) may be a path of this machine.

    Attributes:
        written: results go there, so a folder that is thrown away after the job will not do.
    """

    written: bool = False


def anchored(config: C, base: Path | None = None) -> C:
    """``config`` with every relative path in a :class:`Place` field resolved against ``base``.

    Args:
        base: absolute; the working directory by default.

    Raises:
        ConfigError: results would go into the scratch folder of a submitted job.
    """
    base = base or Path.cwd()
    changes: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        place = next((m for m in field.metadata if isinstance(m, Place)), None)
        if isinstance(value, Config):
            changes[name] = anchored(value, base)
        elif isinstance(value, tuple) and all(isinstance(item, Config) for item in value):
            changes[name] = tuple(anchored(item, base) for item in value)
        elif place and isinstance(value, str):
            changes[name] = _anchored_text(name, value, place, base)
        elif place and isinstance(value, Mapping):
            changes[name] = {key: _anchored_text(f"{name}.{key}", text, place, base) for key, text in value.items()}
    return config.model_copy(update=changes)


def absolute(name: str, path: str, *, written: bool = False, base: Path | None = None) -> str:
    """``path`` as an absolute URL or path; ``name`` is what an error calls it. Raises as :func:`anchored`."""
    return _anchored_text(name, path, Place(written), base or Path.cwd())


def _anchored_text(name: str, text: str, place: Place, base: Path) -> str:
    if text.startswith("sqlite:///"):
        file = text.removeprefix("sqlite:///")
        return text if file.startswith("/") else f"sqlite:///{_anchored_text(name, file, place, base)}"
    if not text or text in _NAMED or "://" in text or text.startswith(_SCHEMES):
        return text
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    if place.written and _JOB_SCRATCH in str(base):
        raise ConfigError(
            f"'{name}' is the relative path {text}, which in a submitted job is a folder that Ray deletes afterwards.",
            f"Give a URL or an absolute path that every node sees, for example {name}=s3://bucket/{text}",
        )
    return str(base / path)
