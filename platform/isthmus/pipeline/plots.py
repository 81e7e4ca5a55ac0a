"""Plots of a run as inline SVG, so that a report is one file that opens anywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.contracts import Reference

_COLOURS = ("#1f6f8b", "#e58e26", "#9aa5ab", "#6ab04c")


@dataclass(frozen=True)
class Curve:
    """A logged scalar: ``values[i]`` at optimizer step ``steps[i]``."""

    steps: Sequence[int]
    values: Sequence[float]


def loss_curves(title: str, curves: Mapping[str, Curve], references: Mapping[str, Reference]) -> str:
    """One panel for each loss part with its chance level (dashed) and floor (dotted), as an ``<svg>`` element."""
    from matplotlib.figure import Figure  # imported late: half a second that only reports pay

    figure = Figure(figsize=(3.6 * max(len(curves), 1), 2.9), layout="constrained")
    axes = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        axis.plot(curve.steps, curve.values, color="#1f6f8b", linewidth=1.4)
        axis.set_title(f"{title}: {name}", fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        reference = references.get(name)
        if reference is not None:
            axis.axhline(reference.chance, color="#b33939", linestyle="--", linewidth=0.9, label="chance")
            axis.axhline(reference.floor, color="#666666", linestyle=":", linewidth=0.9, label="floor")
            axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], unit: str = "%") -> str:
    """Grouped bars: ``groups[series][label]`` in ``unit``, as an ``<svg>`` element."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for series in groups.values() for label in series))
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(len(groups), 1)
    for i, (name, series) in enumerate(groups.items()):
        places = [x - 0.4 + width * (i + 0.5) for x in range(len(labels))]
        axis.bar(places, [series.get(label, 0.0) for label in labels], width, label=name, color=_COLOURS[i % 4])
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def histogram(title: str, series: Mapping[str, Sequence[float]], unit: str, *, log: bool = False) -> str:
    """How often values occur, one outline for each of ``series``, as an ``<svg>`` element.

    Args:
        title: above the plot.
        series: name -> values; those without values are left out.
        unit: of the values, below the plot.
        log: bins of equal ratio instead of equal width, for values above 0.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    filled = {name: np.asarray(values, float) for name, values in series.items() if len(values)}
    low = min((float(v.min()) for v in filled.values()), default=1.0)
    high = max((float(v.max()) for v in filled.values()), default=2.0)
    whole = all((v == v.round()).all() for v in filled.values()) and not log and high - low < 40
    if whole:  # a bar for each number
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.geomspace(low, high * 1.01, 41) if log else np.linspace(low, high + (high == low), 41)
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(filled.items(), _COLOURS, strict=False):
        axis.hist(values, bins=edges.tolist(), color=colour, alpha=0.75 if len(filled) == 1 else 0.5, label=name)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 500 * low else (1.0,)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=8)
    axis.set_ylabel("how many", fontsize=8)
    axis.tick_params(labelsize=8)
    if len(filled) > 1:
        axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


@dataclass(frozen=True)
class Point:
    """One model in a :func:`scatter`: its name, what kind of row it is, cost and quality (a share)."""

    label: str
    kind: str
    x: float
    y: float


def interval_bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    chance: float,
) -> str:
    """Lying bars with their intervals and a line at chance, as an ``<svg>`` element.

    Args:
        labels: of the rows, from the top.
        series: name -> (share, lower end, upper end) of each row.
        chance: a share.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.1 + 0.26 * len(labels) * max(len(series), 1)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        places = [y - 0.4 + height * (i + 0.5) for y in range(len(labels))]
        shares = [100 * share for share, _, _ in values]
        reach = [[100 * (s - low) for s, low, _ in values], [100 * (high - s) for s, _, high in values]]
        axis.barh(places, shares, height, label=name, color=_COLOURS[i % 4])
        axis.errorbar(shares, places, xerr=reach, fmt="none", ecolor="#1d2b36", elinewidth=0.9, capsize=2)
    axis.axvline(100 * chance, color="#b33939", linestyle="--", linewidth=0.9, label="chance")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("%", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def scatter(points: Sequence[Point], x: str, y: str, chance: float, log: bool = False) -> str:
    """Quality against cost, each point with its name, as an ``<svg>`` element; ``x`` and ``y`` name the axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axis = figure.subplots()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for kind, colour in zip(kinds, _COLOURS, strict=False):
        own = [point for point in points if point.kind == kind]
        axis.scatter([p.x for p in own], [100 * p.y for p in own], color=colour, label=kind, s=28)
    axis.axhline(100 * chance, color="#b33939", linestyle="--", linewidth=0.9, label="chance")
    for place, point in enumerate(sorted(points, key=lambda p: (p.x, p.y))):
        below = place % 2 == 1  # neighbours do not write over each other
        axis.annotate(
            point.label,
            (point.x, 100 * point.y),
            xytext=(4, -10 if below else 5),
            textcoords="offset points",
            fontsize=7,
        )
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(f"{y}, %", fontsize=8)
    axis.margins(x=0.15, y=0.15)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _svg(figure: object) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    text = sink.getvalue()
    return text[text.index("<svg") :]
