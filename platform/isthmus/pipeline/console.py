"""What a person sees of a running pipeline. Everything goes to stderr; stdout stays free for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

_console = Console(stderr=True, highlight=False)


def announce(number: int, total: int, step: str, says: str) -> None:
    """The heading of a step."""
    _console.print(f"\n[bold cyan]({number}/{total}) {step}[/]  {escape(says)}")


def finished(seconds: float, result: Mapping[str, Any]) -> None:
    """A step that has just run, and where its output is."""
    _console.print(f"    [green]done[/] in {seconds:.1f} s  {_summary(result)}")


def reused(result: Mapping[str, Any]) -> None:
    """A step whose record was found whole."""
    _console.print(f"    [green]already done[/]  {_summary(result)}")


def _summary(result: Mapping[str, Any]) -> str:
    shown = []
    for key, value in result.items():
        if isinstance(value, float):
            shown.append(f"{key} {value:.4g}")
        elif isinstance(value, (str, int)) and len(str(value)) <= 80:
            shown.append(f"{key} {value}")
    return escape(", ".join(shown[:8]))  # an answer or a caption may look like markup
