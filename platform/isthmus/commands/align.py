"""``isthmus align``: what is decided before a projector is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.commands import recipes
from isthmus.commands.shell import plain, show
from isthmus.ray_session import ray_session

app = typer.Typer(no_args_is_help=True, help="Find the encoders that a projector can join.")


@app.callback()
def align() -> None:
    """Find the encoders that a projector can join."""


@app.command()
def select(
    words: Annotated[list[str], typer.Argument(metavar="[RECIPE] [KEY=VALUE]", show_default=False)],
) -> None:
    """Compare image encoders with text encoders by CKA, before anything is trained. Run it again to resume.

    Each value stands beside what permuted pairs give and the number of samples. The report, a table and a plot, goes
    to the folder 'out' as select.json and select.html.

    Examples:
      $ isthmus align select pipelines/projector/select.yaml
      $ isthmus align select pipelines/projector/select.yaml data=s3://bucket/pairs out=s3://bucket/select sample=20000
      $ isthmus align select data=data/demo/train out=runs/select text='["pkg:all-minilm-l6-v2"]' \\
          vision='[{name: tf_efficientnet_lite0, weights: "pkg:efficientnet-lite0"}, vit_base_patch14_dinov2.lvd142m]'
    """
    from isthmus.config import SelectConfig

    config = recipes.load(SelectConfig, words)
    from isthmus.alignment.select import select as work
    from isthmus.pipeline.alignment import write_select_page

    with ray_session(config.actors * config.cpus_per_actor):
        report = work(config)
    page = write_select_page(report)
    best = f"{report.best_vision} with {report.best_text}"
    show({**plain(report), "page": page}, title=f"Most alike: {best}")
