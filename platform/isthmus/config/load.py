"""Reading recipes: YAML, ``section.key=value`` overrides, and errors that name file, key and the mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from isthmus.config.base import Config, MethodConfig
from isthmus.config.run import RunConfig
from isthmus.errors import ConfigError, nearest

C = TypeVar("C", bound=Config)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(
            f"There is no recipe at {file}.{nearest(file.name, siblings)}", "Give the path of a YAML file."
        )
    try:
        value = _load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{file}{where} is not valid YAML: {getattr(error, 'problem', error)}.", "Mend that line."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no mapping of keys to values.", "Start from one of the recipes in pipelines/.")
    return value


def _load(text: str) -> Any:
    """YAML's safe loader, which by itself takes the last of two sections of one name without a word."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            names = [key.value for key in keys]
            if twice := next((key for n, key in enumerate(keys) if key.value in names[:n]), None):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{twice.value}' is there a second time", twice.start_mark
                )
            waiting += [value for _, value in node.value]
    return yaml.safe_load(text)


def apply_overrides(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``recipe`` with every ``section.key=value`` laid over it; values are read as YAML."""
    out = _copy(recipe)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"The override '{item}' is not of the form section.key=value.", "Example: train.lr=3e-4")
        try:
            value = _scalar(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"The value in the override '{item}' is not valid YAML.", f"Quote it: {key}='\"...\"'"
            ) from error
        _set(out, key.strip(), value, item)
    return out


def lay_over(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``recipe`` with the value of every dotted key in its place."""
    out = _copy(recipe)
    for key, value in values.items():
        _set(out, key, value, f"{key}={value}")
    return out


def _set(recipe: dict[str, Any], key: str, value: Any, item: str) -> None:
    *sections, leaf = key.split(".")
    node = recipe
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"The override '{item}' goes into '{section}', which is a single value, not a section.")
        node = child
    node[leaf] = value


def load_config(
    kind: type[C],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    context: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> C:
    """A validated ``kind`` from a YAML file (or from ``values``) and overrides.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type (with what was expected), or a value that
            the schema refuses. Names the file and the dotted key; lists every fault, not only the first.
    """
    recipe = apply_overrides(values if values is not None else read_yaml(path or ""), overrides)
    where = str(path) if path else "the given options"
    try:
        return kind.model_validate(recipe, context=dict(context or {}))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(where, kind, error, context or {}, recipe))) from error


def load_run(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    methods: Mapping[str, type[MethodConfig]],
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A training recipe, its ``method`` section validated by the method of that name."""
    return load_config(RunConfig, path, overrides, context={"methods": dict(methods)}, values=values)


def to_yaml(config: BaseModel) -> str:
    """The resolved recipe, every default written out; reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text) if text.strip() else ""
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string; everyone who types it means the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return value


def _explain(
    where: str, kind: type[BaseModel], error: ValidationError, context: Mapping[str, Any], recipe: Mapping[str, Any]
) -> Iterator[str]:
    for fault in error.errors():
        path = [str(p) for p in fault["loc"]]
        dotted = ".".join(path) or "the recipe"
        if fault["type"] == "extra_forbidden":
            known = _fields(kind, path[:-1], context, recipe)
            listing = f" Known keys here: {', '.join(sorted(known))}." if known else ""
            yield f"{where}: unknown key '{dotted}'.{nearest(path[-1], known)}{listing}"
        elif fault["type"] == "missing":
            yield f"{where}: the key '{dotted}' is missing. Add it."
        else:
            given = fault.get("input")
            shown = "" if isinstance(given, (dict, BaseModel)) else f" (given: {given!r})"
            message = fault["msg"].removeprefix("Value error, ")
            yield f"{where}: '{dotted}': {message}{shown}."


def _fields(
    kind: type[BaseModel], path: Sequence[str], context: Mapping[str, Any], recipe: Mapping[str, Any]
) -> list[str]:
    """Field names of the section that ``path`` leads to."""
    node: Any = recipe
    for name in path:
        if isinstance(node, list) and name.isdigit():  # an item of a list, of the kind that the list was of
            node = node[int(name)]
            continue
        node = node.get(name, {}) if isinstance(node, Mapping) else {}
        if kind is RunConfig and name == "method":
            chosen = context.get("methods", {}).get(node.get("name") if isinstance(node, Mapping) else None)
            if chosen is None:
                return []
            kind = chosen
            continue
        spec = kind.model_fields.get(name)
        inner = (
            next((t for t in _types(spec.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
            if spec
            else None
        )
        if inner is None:
            return []
        kind = inner
    return list(kind.model_fields)


def _types(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType, tuple):
        for arm in get_args(annotation):
            yield from _types(arm)
    else:
        yield annotation
