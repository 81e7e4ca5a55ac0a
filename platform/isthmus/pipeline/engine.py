"""Runs the steps of a pipeline file in order and skips what is already done.

A step's record (``<out>/steps/<id>.json``) holds the digest of everything the step was asked and of the results before
it. A step whose record carries the same digest and whose output is still there is not run again, so that an
interrupted pipeline goes on where it was; every step is itself resumable, so that also half a step is not lost.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from isthmus import storage
from isthmus.config import Config, absolute, load_config, read_yaml
from isthmus.errors import ConfigError, nearest
from isthmus.pipeline.compare import CompareOptions, unknown_steps
from isthmus.pipeline.console import announce, finished, reused
from isthmus.pipeline.steps import STEPS, StepContext, check_options

OUTPUTS = ("out", "url", "run", "html", "json")
"""Fields of a step's result that say where its output is."""
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")


class StepSpec(Config):
    """One step: what to run and with what."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    run: str
    says: str = Field("", description="one sentence for the person who watches")
    recipe: str | None = Field(None, description="a recipe file, relative to the pipeline file")
    options: dict[str, Any] = Field({}, description="options of the step, or overrides of the recipe (dotted keys)")

    @field_validator("run")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STEPS:
            raise ValueError(f"no step runs '{value}'.{nearest(value, STEPS)} Known: {', '.join(sorted(STEPS))}")
        return value


class Pipeline(Config):
    """A pipeline file.

    A file that ``extends`` another changes some of its keys and parameters. In any string ``${name}`` is a parameter
    and ``${step.field}`` a field of an earlier step's result.
    """

    name: str
    out: str = Field(description="folder for records, reports and runs")
    params: dict[str, str | int | float | bool] = Field({}, description="what ``${name}`` stands for")
    steps: tuple[StepSpec, ...]

    @field_validator("steps")
    @classmethod
    def _distinct(cls, value: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
        ids = [step.id for step in value]
        doubled = sorted({i for i in ids if ids.count(i) > 1})
        if doubled:
            raise ValueError(f"the step ids {doubled} occur more than once")
        return value

    @field_validator("steps")
    @classmethod
    def _comparable(cls, value: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
        """A comparison comes last, when hours may have gone; what it names is checked first."""
        for number, step in enumerate(value):
            if step.run == "compare":
                options = CompareOptions.model_validate(step.options)
                if unknown := next(unknown_steps(options, [s.id for s in value[:number]]), None):
                    raise ValueError(unknown)
        return value


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """A validated pipeline; an override without a dot that names a parameter sets that parameter.

    Raises:
        ConfigError: as for any recipe.
    """
    values = _extended(Path(path))
    pipeline = load_config(Pipeline, path, values=values)
    return load_config(Pipeline, path, [_named(o, pipeline) for o in overrides], values=values)


def _named(override: str, pipeline: Pipeline) -> str:
    """The override with ``params.`` before the name of a parameter."""
    key = override.partition("=")[0]
    known = {*pipeline.params, *Pipeline.model_fields}
    if key.isidentifier() and key not in known:
        raise ConfigError(
            f"The pipeline has no parameter '{key}'.{nearest(key, known)}",
            f"Its parameters are: {', '.join(sorted(pipeline.params)) or 'none'}.",
        )
    return f"params.{override}" if key in pipeline.params else override


def _folder(out: str) -> Path:
    """Where a pipeline's records and reports go.

    Raises:
        ConfigError: a URL, or a relative path in a submitted job.
    """
    if "://" in out:
        raise ConfigError(
            f"'out' of a pipeline is {out}, and its records and reports are files in a folder.",
            "Give a path that the driver's machine keeps; the trainings' own 'storage' may be a URL.",
        )
    absolute("out", out, written=True)  # refuses what a submitted job would lose; a path stays as it was given
    return Path(out)


def _extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's mapping, laid over that of the pipeline it ``extends``, which stands in the same folder."""
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself, perhaps through others.", "Name another pipeline in 'extends'.")
    values = read_yaml(path)
    if "extends" not in values:
        return values
    below = _extended(path.parent / str(values.pop("extends")), (*above, path.resolve()))
    return {**below, **values, "params": {**(below.get("params") or {}), **(values.get("params") or {})}}


def run_pipeline(path: str | Path, overrides: Sequence[str] = (), *, fresh: bool = False) -> dict[str, Any]:
    """Every step's result by id, after running those that are not yet done.

    Args:
        fresh: forget the records (not the data: each step still reuses what it finds whole).
    """
    pipeline = load_pipeline(path, overrides)
    scope: dict[str, Any] = {**pipeline.params}
    out = _folder(substitute(pipeline.out, scope))
    scope["out"] = str(out)
    _check_ahead(path, pipeline, scope)
    records = out / "steps"
    records.mkdir(parents=True, exist_ok=True)
    if fresh:
        for record in records.glob("*.json"):
            record.unlink()
    results: dict[str, Any] = {}
    chain = ""
    for number, step in enumerate(pipeline.steps, 1):
        options = substitute(step.options, scope)
        recipe = _recipe_path(path, step)
        chain = _digest(chain, step.run, options, recipe.read_text(encoding="utf-8") if recipe else "")
        record = records / f"{step.id}.json"
        announce(number, len(pipeline.steps), step.id, substitute(step.says, scope))
        done = _read_record(record, chain)
        if done is None:
            started = time.monotonic()
            context = StepContext(out=out, recipe=recipe, results=results, params=dict(pipeline.params))
            result = STEPS[step.run](context, options)
            done = {"digest": chain, "run": step.run, "seconds": round(time.monotonic() - started, 2), "result": result}
            _write_atomically(record, done)
            finished(done["seconds"], result)
        else:
            reused(done["result"])
        chain = _digest(chain, _lasting(done["result"]))
        results[step.id] = done["result"] | {"step_seconds": done["seconds"]}
        scope |= {f"{step.id}.{k}": v for k, v in done["result"].items()}
    return results


def _check_ahead(path: str | Path, pipeline: Pipeline, scope: Mapping[str, Any]) -> None:
    """What every step names has to be there before the first one runs, which may take hours.

    Raises:
        ConfigError: a recipe that does not exist, a reference to no parameter and no earlier step, an unknown option.
    """
    earlier: list[str] = []
    for step in pipeline.steps:
        recipe = _recipe_path(path, step)
        for name in _references([step.options, step.says]):
            if name not in scope and name.partition(".")[0] not in earlier:
                _look_up(name, {**scope, **{f"{known}.{name.partition('.')[2]}": None for known in earlier}})
        check_options(step.run, recipe, step.options, earlier)
        earlier.append(step.id)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)
    elif isinstance(value, str):
        yield from _REFERENCE.findall(value)


def substitute(value: Any, scope: Mapping[str, Any]) -> Any:
    """``value`` with every ``${name}`` filled in. A string that is one reference takes the referenced value's type.

    Raises:
        ConfigError: a reference to nothing.
    """
    if isinstance(value, Mapping):
        return {k: substitute(v, scope) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [substitute(v, scope) for v in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1], scope)
    return _REFERENCE.sub(lambda m: str(_look_up(m[1], scope)), value)


def _look_up(name: str, scope: Mapping[str, Any]) -> Any:
    if name not in scope:
        raise ConfigError(
            f"The pipeline refers to '${{{name}}}', which is no parameter and no earlier step's result."
            f"{nearest(name, scope)}",
            f"Known here: {', '.join(sorted(scope))}.",
        )
    return scope[name]


def _recipe_path(pipeline: str | Path, step: StepSpec) -> Path | None:
    if step.recipe is None:
        return None
    recipe = Path(pipeline).parent / step.recipe
    if not recipe.is_file():
        raise ConfigError(
            f"Step '{step.id}' of {pipeline} names the recipe {recipe}, which does not exist.",
            "The path is relative to the pipeline file.",
        )
    return recipe


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _lasting(result: Mapping[str, Any]) -> dict[str, Any]:
    """What later steps go by: a step that is run again and finds the same need not be followed by the others."""
    passing = ("seconds", "per_s", "reused", "skipped", "encoded", "memory")
    return {name: value for name, value in result.items() if not any(word in name for word in passing)}


def _read_record(record: Path, digest: str) -> dict[str, Any] | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("digest") == digest and _still_there(found["result"]) else None


def _still_there(result: Mapping[str, Any]) -> bool:
    """Whether everything that the step wrote is where it says; somebody may have emptied ``data/`` since."""
    places = [str(result[name]) for name in OUTPUTS if result.get(name)]
    return all(storage.exists(place) for place in places if not place.startswith(("http://", "https://")))


def _write_atomically(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, default=str), encoding="utf-8")
    part.replace(path)
