"""The ``isthmus`` command. Each command reads its recipe and calls the same function that ``jobs/`` calls."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from isthmus import __version__
from isthmus.commands import align, data, diagnose, model, plan, run, use
from isthmus.commands.shell import Shell

app = typer.Typer(
    cls=Shell,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="--json and --debug may stand anywhere. Every command shows examples: isthmus COMMAND --help",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


@app.callback()
def root(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Join a frozen vision model to a frozen language model: train, register, caption in bulk, serve."""


app.command()(run.demo)
app.add_typer(data.app, name="data")
app.add_typer(align.app, name="align")
app.command()(plan.plan)
app.command()(run.train)
app.command(name="run")(run.run)
app.command()(use.evaluate)
app.command()(use.caption)
app.command()(use.embed)
app.command()(use.serve)
app.add_typer(model.app, name="model")
app.command()(diagnose.doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point, and that of every file in ``jobs/``.

    Args:
        arguments: the words after ``isthmus``; those of the process by default.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    app(args=None if arguments is None else list(arguments), prog_name="isthmus")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    # A stopped job gets SIGTERM and a few seconds: end as after Ctrl-C, closing what is open.
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
