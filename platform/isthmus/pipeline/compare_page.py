"""How a comparison looks: the plots, the page, the Markdown for documentation, the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isthmus.pipeline.page import render
from isthmus.pipeline.plots import Point, interval_bars, scatter

if TYPE_CHECKING:
    from isthmus.pipeline.compare import CompareOptions

Row = Mapping[str, Any]


def plots(rows: Sequence[Row], options: CompareOptions) -> dict[str, str]:
    """SVG by file name: the quality figures with their intervals, and their mean against what it cost."""
    labels = [row["method"] for row in rows]
    bars = {
        said(name).removesuffix(", %"): [
            (row[name], *row.get(f"{name}_interval", (row[name], row[name]))) for row in rows
        ]
        for name in options.quality
    }
    drawn = {"quality": interval_bars(options.title, labels, bars, chance=rows[0][options.chance])}
    mean = ("mean of " if len(bars) > 1 else "") + " and ".join(bars)
    for cost, log in options.against.items():
        points = [Point(r["method"], r["kind"], float(r[cost]), _mean(r, options.quality)) for r in rows]
        drawn[f"quality-by-{cost.replace('_', '-')}"] = scatter(points, said(cost), mean, rows[0][options.chance], log)
    return drawn


def page(rows: Sequence[Row], options: CompareOptions, drawn: Mapping[str, str]) -> str:
    """The HTML page."""
    best = max((r for r in rows if r["kind"] == "method"), key=lambda r: _mean(r, options.quality), default=rows[0])
    chance = rows[0][options.chance]
    tiles = [
        {"name": "highest", "value": best["method"], "note": _each(best, options.quality), "state": ""},
        {"name": "held-out images", "value": f"{rows[0]['images']:,}", "note": "the same for all rows", "state": ""},
        {"name": options.chance, "value": f"{chance:.2%}", "note": "of a model that knows nothing", "state": ""},
    ]
    return render(
        "compare.html",
        title=options.title,
        lead=options.lead,
        tiles=tiles,
        plots=list(drawn.values()),
        columns=[said(name) for name in options.table],
        rows=[
            {
                "method": r["method"],
                "kind": r["kind"],
                "about": r["about"],
                "cells": [cell(r, n) for n in options.table],
            }
            for r in rows
        ],
        uris=[{"method": row["method"], "uri": row["uri"]} for row in rows],
    )


def markdown(rows: Sequence[Row], options: CompareOptions, drawn: Mapping[str, str]) -> str:
    """The same table for documentation; pictures are links to the files beside it."""
    head = ["", "kind", *(said(name) for name in options.table)]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * len(options.table)]
    for row in rows:
        cells = [row["method"], row["kind"], *(cell(row, name) for name in options.table)]
        lines.append(f"| {' | '.join(cells)} |")
    about = [f"- **{row['method']}**: {row['about']}" for row in rows if row["about"]]
    pictures = [f"![{name}](plots/{name}.svg)" for name in drawn]
    blocks = [f"# {options.title}", options.lead, "\n".join(lines), "\n".join(about), "\n\n".join(pictures)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def show(rows: Sequence[Row], options: CompareOptions) -> None:
    """The table on standard error."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    needed = 30 + 13 * len(options.table)
    if not console.is_terminal:  # a log has no edge to fold at
        console = Console(stderr=True, highlight=False, width=max(console.width, needed))
    narrow = console.width < needed
    table = Table(title=options.title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", min_width=max(12 if narrow else len(row["method"]) for row in rows))
    for name in options.table:
        table.add_column(said(name), justify="right")
    colours = {"method": "cyan", "baseline": "yellow", "control": "magenta"}
    for row in rows:
        table.add_row(f"[{colours[row['kind']]}]{row['method']}[/]", *(cell(row, name) for name in options.table))
    console.print(table)
    console.print("[cyan]method[/]  [yellow]baseline[/]  [magenta]control[/]; ± is half of a 95 % interval")


_SAID = {
    **{f"{way}_r{k}": f"{way.upper()}@{k}, %" for way in ("tr", "ir") for k in (1, 5, 10)},
    "seconds": "training, s",
    "stepping_seconds": "stepping, s",
    "evaluation_seconds": "evaluation, s",
    "trainable_parameters": "trained parameters",
    "peak_memory_gib": "memory, GiB",
}


def said(name: str) -> str:
    """A figure's name for people."""
    return _SAID.get(name, name.replace("_", " "))


def cell(row: Row, name: str) -> str:
    """A figure for people; shares in per cent with half of their interval."""
    value = row[name]
    if interval := row.get(f"{name}_interval"):
        return f"{100 * value:.1f} ± {50 * (interval[1] - interval[0]):.1f}"
    if name.startswith("chance"):
        return f"{100 * value:.2f} %"
    if name.endswith("parameters"):
        return f"{value / 1e6:.2f} M"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def _mean(row: Row, names: Sequence[str]) -> float:
    return sum(float(row[name]) for name in names) / len(names)


def _each(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{said(name)} {cell(row, name)}" for name in names)
