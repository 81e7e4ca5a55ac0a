"""``isthmus demo``, ``isthmus train``, ``isthmus run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.commands import recipes
from isthmus.commands.shell import show, state
from isthmus.errors import ConfigError
from isthmus.ray_session import ray_session

Words = Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]", show_default=False)]


def train(words: Words) -> None:
    """Train one recipe. The same run name resumes where it was.

    Examples:
      $ isthmus train pipelines/demo/stage1.yaml
      $ isthmus train pipelines/demo/stage1.yaml train.steps=40 cluster.workers=1
    """
    config = recipes.load_training(words)
    from isthmus.training.driver import fit

    version = fit(config)
    show(version, title=f"Trained {config.name} for {config.train.steps} steps.")


def run(
    words: Annotated[list[str], typer.Argument(metavar="PIPELINE [KEY=VALUE]", show_default=False)],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget which steps are done and go through all again.")
    ] = False,
) -> None:
    """Run a pipeline: its steps in order, without those that are already done.

    Examples:
      $ isthmus run pipelines/demo.yaml
      $ isthmus run pipelines/demo.yaml seed=1 out=runs/demo-seed1
    """
    pipeline, overrides = recipes.split(words)
    if pipeline is None:
        raise ConfigError("No pipeline file is named.", "Example: isthmus run pipelines/demo.yaml")
    _run(pipeline, overrides, fresh)


def demo(
    long: Annotated[bool, typer.Option("--long", help="Up to forty minutes, and learns more.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed, in a folder of its own.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget which steps are done and go through all again.")
    ] = False,
) -> None:
    """The whole thread on real images: fetch, train both stages, evaluate, caption, serve, report.

    Examples:
      $ isthmus demo
      $ isthmus demo --seed 1
      $ isthmus demo --long
    """
    name = "demo-long" if long else "demo"
    overrides = [] if seed is None else [f"seed={seed}", f"out=runs/{name}-seed{seed}"]
    _run(str(shipped(f"pipelines/{name}.yaml")), overrides, fresh)


def shipped(path: str) -> Path:
    """A file of the repository, seen from the working directory or from an editable installation.

    Raises:
        ConfigError: there is no such file in either.
    """
    import isthmus

    for root in (Path(), Path(isthmus.__file__).resolve().parents[2]):
        if (root / path).is_file():
            return root / path
    raise ConfigError(f"There is no {path} here.", "Run the command in the root of the Isthmus repository.")


def _run(pipeline: str, overrides: list[str], fresh: bool) -> None:
    from isthmus.pipeline import run_pipeline

    with ray_session():
        results = run_pipeline(pipeline, overrides, fresh=fresh)
    last = next(reversed(results))
    show(results if state.json else results[last], title=f"\nAll {len(results)} steps are done; the last one, {last}:")
