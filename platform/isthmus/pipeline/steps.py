"""The kinds of step: each takes its options, calls the function that the command line calls, returns a flat result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from isthmus.config import (
    CaptionConfig,
    Config,
    EmbedConfig,
    EvaluateConfig,
    ServeConfig,
    TrackingConfig,
    VisionConfig,
    anchored,
    load_config,
    load_run,
    read_yaml,
)
from isthmus.config.load import lay_over
from isthmus.errors import ConfigError, nearest
from isthmus.pipeline.compare import CompareOptions

C = TypeVar("C", bound=Config)
Result = dict[str, Any]


@dataclass(frozen=True)
class StepContext:
    """What a step may look at beside its options.

    Attributes:
        out: the pipeline's folder.
        recipe: the step's recipe file, if it names one.
        results: results of the earlier steps by id.
        params: the pipeline's parameters.
    """

    out: Path
    recipe: Path | None
    results: Mapping[str, Result]
    params: Mapping[str, Any]


class FetchOptions(Config):
    """Which image-text set to bring, and where to."""

    name: str
    out: str
    seed: int | None = None
    heldout: int | None = None
    synthetic: bool = False
    limit: int | None = None


class IndexOptions(Config):
    """The folder or URL whose shards are indexed."""

    url: str


class CacheOptions(Config):
    """Whose images are encoded, by which frozen encoder, and where the features go."""

    data: str
    out: str
    vision: VisionConfig = VisionConfig()
    actors: int = 2
    batch: int = 32


class ServeCheckOptions(Config):
    """A service that is started, asked once about a held-out image, and stopped."""

    models: dict[str, str]
    data: str
    row: int = Field(0, description="which held-out image is asked about")
    tracking: TrackingConfig = TrackingConfig()


class ReportOptions(Config):
    """What the report looks at. The names are ids of earlier steps."""

    data: str
    retrieval: str
    projector: str
    captions: str
    scores: str
    serve: str | None = None
    trained: tuple[str, ...]
    seed: int = 0
    tracking: TrackingConfig = TrackingConfig()


def _fetch(_: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.data.sources import fetch

    asked = _options(FetchOptions, options)
    return _flat(
        fetch(
            asked.name, asked.out, seed=asked.seed, heldout=asked.heldout, synthetic=asked.synthetic, limit=asked.limit
        )
    )


def _index(_: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.data.manifest import index

    url = _options(IndexOptions, options).url
    report = index(url)
    return {"url": url, "samples": report.samples, "shards": _count(report.shards), "problems": len(report.problems)}


def _cache(_: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.data.features import build_cache

    asked = _options(CacheOptions, options)
    return {
        "url": asked.out,
        **_flat(build_cache(asked.data, asked.out, asked.vision, actors=asked.actors, batch=asked.batch)),
    }


def _train(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.methods import method_configs
    from isthmus.training.cost import read_cost
    from isthmus.training.driver import fit

    if context.recipe is None:
        raise ConfigError("A 'train' step needs a 'recipe', the path of a training recipe.")
    config = load_run(context.recipe, methods=method_configs(), values=_laid_over(context.recipe, options))
    model = fit(config)
    return {
        "uri": f"models:/{model.name}/{model.version}" if model.version else model.uri,
        "version": model.version,
        "run": f"{config.storage}/{config.name}",
        "name": config.name,
        "method": config.method.name,
        "steps": config.train.steps,
        "global_batch": config.train.global_batch,
        "samples_seen": config.train.steps * config.train.global_batch,
        "seed": config.train.seed,
        **read_cost(f"{anchored(config).storage}/{config.name}"),
    }


def _evaluate(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.evaluation.driver import evaluate

    config = _from_recipe(EvaluateConfig, context, options)
    return {"out": config.out, **evaluate(config)}


def _caption(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.inference.caption import caption

    return _flat(caption(_from_recipe(CaptionConfig, context, options)))


def _embed(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.inference.embed import embed

    return _flat(embed(_from_recipe(EmbedConfig, context, options)))


def _serve_check(_: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.pipeline.serve_check import serve_check

    asked = _options(ServeCheckOptions, options)
    config = ServeConfig(models=asked.models, port=0, auth="none", tracking=asked.tracking, cpus_per_replica=1)
    return serve_check(config, asked.data, asked.row)


def _report(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.pipeline.report import write_report

    return write_report(context.out, context.results, _options(ReportOptions, options))


def _compare(context: StepContext, options: Mapping[str, Any]) -> Result:
    from isthmus.pipeline.compare import write_comparison

    return write_comparison(context.out, context.results, _options(CompareOptions, options))


OPTIONS: dict[str, type[Config]] = {
    "fetch": FetchOptions,
    "index": IndexOptions,
    "cache": CacheOptions,
    "evaluate": EvaluateConfig,
    "caption": CaptionConfig,
    "embed": EmbedConfig,
    "serve-check": ServeCheckOptions,
    "report": ReportOptions,
    "compare": CompareOptions,
}
"""What a kind of step takes where it has no recipe."""

STEPS: dict[str, Callable[[StepContext, Mapping[str, Any]], Result]] = {
    "fetch": _fetch,
    "index": _index,
    "cache": _cache,
    "train": _train,
    "evaluate": _evaluate,
    "caption": _caption,
    "embed": _embed,
    "serve-check": _serve_check,
    "report": _report,
    "compare": _compare,
}


def _options(kind: type[C], options: Mapping[str, Any]) -> C:
    return load_config(kind, None, values=dict(options))


def _from_recipe(kind: type[C], context: StepContext, options: Mapping[str, Any]) -> C:
    if context.recipe is None:
        return _options(kind, options)
    return load_config(kind, context.recipe, values=_laid_over(context.recipe, options))


def _laid_over(recipe: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's mapping with values of dotted keys in it, as they are: a text is not read as YAML once more."""
    return lay_over(read_yaml(recipe), options)


def check_options(run: str, recipe: Path | None, options: Mapping[str, Any], earlier: Sequence[str]) -> None:
    """Refuses keys that a kind of step does not have, and ids of no earlier step. What refers to earlier results is
    only known later, so values are not looked at.

    Raises:
        ConfigError: with the nearest known key or step.
    """
    if run == "report":
        for field in ("retrieval", "projector", "captions", "scores", "serve", "trained"):
            named = options.get(field) or ()
            for name in (named,) if isinstance(named, str) else named:
                if name not in earlier:
                    raise ConfigError(
                        f"A report's '{field}' names '{name}', which is no earlier step.{nearest(name, earlier)}",
                        f"Earlier steps: {', '.join(earlier) or 'none'}.",
                    )
    if (kind := OPTIONS.get(run)) is not None and recipe is None:
        for key in options:
            if key not in kind.model_fields:
                known = kind.model_fields
                raise ConfigError(
                    f"A '{run}' step has no option '{key}'.{nearest(key, known)}", f"It has: {', '.join(known)}."
                )


def _flat(report: Any) -> Result:
    if is_dataclass(report) and not isinstance(report, type):
        return asdict(report)
    return dict(report.model_dump(mode="json")) if hasattr(report, "model_dump") else dict(report)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)
