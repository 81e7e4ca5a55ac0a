"""``isthmus model``: what the registry holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.commands.shell import show

if TYPE_CHECKING:
    from isthmus.config import TrackingConfig

app = typer.Typer(no_args_is_help=True, help="List, show and promote registered models.")
Uri = Annotated[str | None, typer.Option("--tracking", help="MLflow URI; MLFLOW_TRACKING_URI or runs/ by default.")]


@app.command("list")
def list_(tracking: Uri = None) -> None:
    """Every registered model with its versions and aliases.

    Examples:
      $ isthmus model list
    """
    from isthmus.registry.store import list_models

    found = list_models(_tracking(tracking))
    show({"models": found}, title="" if found else "No model is registered yet.")


@app.command("show")
def show_(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")], tracking: Uri = None
) -> None:
    """One model: its lineage, base models and figures.

    Examples:
      $ isthmus model show models:/demo-stage2@candidate
    """
    from isthmus.registry.store import show_model

    show(show_model(model, _tracking(tracking)))


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION")],
    alias: Annotated[str, typer.Argument(help="The alias that this version gets")],
    tracking: Uri = None,
) -> None:
    """Give a version an alias, for example 'production'.

    Examples:
      $ isthmus model promote models:/demo-stage2@candidate production
    """
    from isthmus.registry.store import promote as work

    show(work(model, alias, _tracking(tracking)))


def _tracking(uri: str | None) -> TrackingConfig:
    from isthmus.config import TrackingConfig

    return TrackingConfig(uri=uri)
