"""What every command shares: ``--json`` and ``--debug``, how results are shown, and what a failure looks like.

Exit codes: 0 done, 1 a fault of the program, 2 something the user can mend (also wrong usage), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from isthmus.errors import IsthmusError

USAGE = 2
INTERRUPTED = 130
_ROWS = 20


@dataclass
class State:
    """The switches of the running command and the result it has shown."""

    json: bool = False
    debug: bool = False
    result: dict[str, Any] = field(default_factory=dict)


state = State()


class Shell(TyperGroup):
    """The root command: accepts ``--json`` and ``--debug`` at any place and turns exceptions into sentences."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Moves the two switches to the front, where the root command's own parser finds them."""
        cut = args.index("--") if "--" in args else len(args)
        switches = [a for a in args[:cut] if a in ("--json", "--debug")]
        rest = [a for a in args[:cut] if a not in ("--json", "--debug")] + args[cut:]
        return super().parse_args(ctx, list(dict.fromkeys(switches)) + rest)

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command; with ``--json`` its result is the only thing on standard output."""
        state.json, state.debug, state.result = bool(ctx.params.get("json_")), bool(ctx.params.get("debug")), {}
        code = 0
        with _stdout_kept_for_json(state.json):
            try:
                super().invoke(ctx)
            except (KeyboardInterrupt, IsthmusError) as error:
                code = report(error)
            except typer.Exit as over:
                code = over.exit_code
            except Exception as error:
                if isinstance(error, (typer.Abort, BrokenPipeError)) or _is_usage(error):
                    raise
                code = report(error)
        if state.json:
            print(json.dumps(state.result, default=str))
        if code:
            raise typer.Exit(code)


def report(error: BaseException) -> int:
    """Tells the user what went wrong, on standard error, and returns the exit code."""
    if state.debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        state.result = {"error": "interrupted", "mend": "Run the same command again: it goes on where it was."}
        _say("interrupted. Run the same command again: it goes on where it was.")
        return INTERRUPTED
    known = user_error(error)
    if known is not None:
        state.result = {"error": known.problem, "mend": known.mend}
        _say(f"error: {known}")
        return USAGE
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no further message"
    mend = "" if state.debug else "run again with --debug to see where"
    state.result = {"error": f"{type(error).__name__}: {first_line}", "mend": mend}
    _say(f"error: {type(error).__name__}: {first_line}" + (f" ({mend})" if mend else ""))
    return 1


def user_error(error: BaseException) -> IsthmusError | None:
    """The :class:`IsthmusError` inside ``error``: itself, what caused it, or what a Ray worker raised."""
    queue: list[Any] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if type(current).__module__.startswith("isthmus.") and isinstance(current, IsthmusError):
            return current
        queue += [getattr(current, "cause", None), current.__cause__]
        failures = getattr(current, "worker_failures", None)
        queue += list(failures.values()) if isinstance(failures, Mapping) else []
    return None


def show(result: Any, title: str = "") -> None:
    """Shows a command's result: JSON at the end with ``--json``, else a table on standard output.

    Args:
        result: a mapping, a dataclass or a pydantic model.
        title: a sentence above the table.
    """
    state.result = plain(result)
    if not state.json:
        _print_table(state.result, title)


def plain(value: Any) -> Any:
    """``value`` in the types that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return plain(value.item()) if hasattr(value, "item") and getattr(value, "size", 0) == 1 else str(value)


def _print_table(result: Mapping[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if title:
        console.print(title)
    tables = {k: v for k, v in result.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(result) > len(tables):
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, value in _flat({k: v for k, v in result.items() if k not in tables}):
            if value != [] and value != {}:
                table.add_row(key, _cell(value))
        console.print(table)
    for key, rows in tables.items():
        # A command that returns a list alone shows all of it; beside other results it is cut.
        most = len(rows) if len(result) == 1 else _ROWS
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows[:most]:
            table.add_row(*(_cell(v) for v in row.values()))
        if len(result) > 1:
            console.print(f"\n{key}", style="bold")
        console.print(table)
        if len(rows) > most:
            console.print(f"and {len(rows) - most} more (--json shows all)")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return escape(", ".join(str(v) for v in value[:8]) + (f", and {len(value) - 8} more" if len(value) > 8 else ""))
    return escape("" if value is None else str(value))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_usage(error: Exception) -> bool:
    """Whether the argument parser raised it (its base class has no public name)."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


@contextmanager
def _stdout_kept_for_json(on: bool) -> Iterator[None]:
    """While on, everything that is written to standard output, by this process or a child, goes to standard error."""
    if not on:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
