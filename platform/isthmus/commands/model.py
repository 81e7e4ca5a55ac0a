"""``isthmus model``: what the registry holds, and checkpoints that come in and go out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.commands.shell import plain, show

if TYPE_CHECKING:
    from isthmus.config import TrackingConfig

app = typer.Typer(no_args_is_help=True, help="List, show, promote, import and export models.")
import_app = typer.Typer(no_args_is_help=True, help="Bring a checkpoint of other code in as a model folder.")
export_app = typer.Typer(no_args_is_help=True, help="Write a model for other code.")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")

Uri = Annotated[str | None, typer.Option("--tracking", help="MLflow URI; MLFLOW_TRACKING_URI or runs/ by default.")]
Out = Annotated[str, typer.Option("--out", help="A new folder.")]
Name = Annotated[str | None, typer.Option("--name", help="Register the model under this name, alias 'imported'.")]
ALIAS = "imported"


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
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION or a model folder")],
    tracking: Uri = None,
) -> None:
    """One model: its lineage, base models and figures.

    Examples:
      $ isthmus model show models:/demo-stage2@candidate
      $ isthmus model show runs/blip2-opt
    """
    from pathlib import Path

    if Path(model).expanduser().is_dir():
        from isthmus.methods.interchange import describe_folder

        show(describe_folder(model))
        return
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


@import_app.command("hf")
def import_hf_(
    path: Annotated[str, typer.Argument(help="Folder of a Blip2ForConditionalGeneration or ...ImageTextRetrieval")],
    out: Out,
    name: Name = None,
    tracking: Uri = None,
) -> None:
    """A BLIP-2 in Hugging Face layout: config.json, weights (one file or shards), processor with tokenizer.

    Examples:
      $ isthmus model import hf blip2-opt-2.7b --out runs/blip2-opt
      $ isthmus model import hf blip2-itm-vit-g --out runs/blip2-itm --name blip2-itm
    """
    from isthmus.methods.interchange import import_hf

    _show_import(import_hf(path, out, name=name), name, tracking)


@import_app.command("lavis")
def import_lavis_(
    path: Annotated[str, typer.Argument(help="A .pth of LAVIS, stage 1 or stage 2")],
    out: Out,
    name: Name = None,
    vision: Annotated[
        str | None, typer.Option(help="File of the image tower, where the checkpoint holds none (EVA, CLIP or timm).")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Language model of stage 2: a folder, pkg:NAME or hf:ORG/NAME@REVISION.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Tokenizer of stage 1, likewise; BERT's vocabulary by default.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of the Q-Former; width / 64 by default.")] = None,
    vision_heads: Annotated[
        int | None, typer.Option(help="Heads of the tower; the published tower's of its width by default.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Block of the --vision tower whose output is taken; -2, as in LAVIS, by default.")
    ] = None,
    tracking: Uri = None,
) -> None:
    """A BLIP-2 checkpoint of LAVIS. Frozen parts that LAVIS did not save have to be named.

    Examples:
      $ isthmus model import lavis blip2_pretrained.pth --out runs/blip2 --vision eva_vit_g.pth
      $ isthmus model import lavis blip2_opt.pth --out runs/opt --vision eva_vit_g.pth --language opt-2.7b
    """
    from isthmus.methods.interchange import import_lavis_checkpoint

    done = import_lavis_checkpoint(
        path, out, vision=vision, language=language, text=text, heads=heads, vision_heads=vision_heads, layer=layer,
        name=name,
    )  # fmt: skip
    _show_import(done, name, tracking)


@export_app.command("hf")
def export_hf_(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION or a model folder")],
    out: Out,
    check: Annotated[bool, typer.Option(help="Open the result with stock transformers before it is kept.")] = True,
    tolerance: Annotated[
        float,
        typer.Option(help="Accepted difference of the queries' outputs; transformers' ln_vision has another eps."),
    ] = 1e-4,
    tracking: Uri = None,
) -> None:
    """A folder that stock transformers opens: stage 1 for image-text retrieval, stage 2 for generation.

    Examples:
      $ isthmus model export hf models:/demo-stage2@candidate --out exported
      $ isthmus model export hf runs/blip2-opt --out exported --no-check
    """
    from isthmus.methods.interchange import export_hf
    from isthmus.registry.store import resolve

    show(export_hf(resolve(model, _tracking(tracking)).path, out, check=check, tolerance=tolerance))


def _show_import(done: Any, name: str | None, tracking: str | None) -> None:
    found = plain(done)
    if name is not None:
        from isthmus.registry.models import register_folder

        found["uri"] = register_folder(done.out, name, ALIAS, _tracking(tracking)).uri
    show(found)


def _tracking(uri: str | None) -> TrackingConfig:
    from isthmus.config import TrackingConfig

    return TrackingConfig(uri=uri)
