"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.planning.plan import Plan

GIB = 2.0**30


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints memory by ZeRO stage, the step, the whole run, and what all of it assumes."""
    console = console or Console(highlight=False)
    run = plan.run
    console.print(
        f"{run['name']} ({run['method']}): {run['workers']} x {run['gpu']} in {run['nodes']} "
        f"node{'s' if run['nodes'] > 1 else ''}, global batch {run['global_batch']:,}, "
        f"{run['images_per_worker']} images a worker, {run['precision']}, ZeRO {run['zero_stage']}"
    )
    counts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    console.print(f"Parameters: {counts}\n")
    console.print(_memory(plan))
    console.print(verdict(plan) + "\n")
    console.print(_flops(plan))
    console.print(_step(plan))
    console.print(_whole(plan))
    rows = [[a.what, a.value, a.source] for a in plan.assumptions]
    console.print(_table("Assumptions", ["what", "value", "where it comes from"], rows, numbers=False))


def verdict(plan: Plan) -> str:
    """Whether the recipe fits, and if not, what does."""
    run, chosen = plan.run, plan.chosen
    size, stage = run["global_batch"], run["zero_stage"]
    room = run["gpu_memory"] / (1 if run["gpu"] != "cpu" else run["gpus_per_node"])
    if chosen.fits:
        return (
            f"Fits: {chosen.total / GIB:.1f} of {room / GIB:.1f} GiB. The largest global batch that does under ZeRO "
            f"{stage} is {chosen.largest_global_batch:,}."
        )
    text = f"Does not fit: train.global_batch {size:,} needs {chosen.total / GIB:.1f} GiB of {room / GIB:.1f} GiB."
    if chosen.largest_global_batch:
        text += f" The largest that fits under ZeRO {stage} is {chosen.largest_global_batch:,}."
    else:
        text += f" Under ZeRO {stage} not even one image a worker fits."
    better = [s for s, found in plan.stages.items() if found.fits]
    return text + (f" It fits under ZeRO {', '.join(map(str, better))}." if better else "")


def _memory(plan: Plan) -> Table:
    stages = plan.stages.values()
    names = [name for name in plan.chosen.memory if any(stage.memory[name] for stage in stages)]
    rows = [[name, *(_gib(stage.memory[name]) for stage in stages)] for name in names]
    rows.append(["all", *(_gib(stage.total) for stage in stages)])
    if any(stage.host for stage in stages):
        rows.append(["in the host's memory", *(_gib(sum(stage.host.values())) for stage in stages)])
    rows.append(["fits", *("yes" if stage.fits else "no" for stage in stages)])
    rows.append(["largest global batch", *(f"{stage.largest_global_batch:,}" for stage in stages)])
    rows.append(["sent per step, GiB", *(_gib(stage.communication_bytes) for stage in stages)])
    rows.append(["step, s", *(f"{stage.step_seconds:.3g}" for stage in stages)])
    columns = ["GiB on each worker", *(f"ZeRO {stage}" for stage in plan.stages)]
    return _table("Memory", columns, rows)


def _flops(plan: Plan) -> Table:
    rows = [
        [name, *(f"{value / 1e12:,.4g}" for value in (part["forward"], part["backward"], sum(part.values())))]
        for name, part in plan.flops.items()
    ]
    total = [sum(part[side] for part in plan.flops.values()) / 1e12 for side in ("forward", "backward")]
    rows.append(["all", *(f"{value:,.4g}" for value in (*total, sum(total)))])
    return _table("Matrix products of a worker's step", ["TFLOP", "forward", "backward", "both"], rows)


def _step(plan: Plan) -> Table:
    seconds = ("seconds", "matrix products", "AdamW", "communication not hidden")
    rows = [[f"{name}, s" if name != "seconds" else "step, s", f"{plan.step[name]:.4g}"] for name in seconds]
    rows.append(["model-FLOPs utilisation", f"{plan.step['model-FLOPs utilisation']:.1%}"])
    rest = [name for name in plan.step if name not in (*seconds, "model-FLOPs utilisation")]
    rows += [[name, f"{plan.step[name]:,.5g}" if plan.step[name] < 100 else f"{plan.step[name]:,.0f}"] for name in rest]
    rows += [["read per step", _bytes(plan.data["bytes per step"])]]
    rows += [["read per second", _bytes(plan.data["bytes per second"])]]
    return _table("One step, all workers together", ["", ""], rows)


def _whole(plan: Plan) -> Table:
    whole = plan.whole
    rows = [["steps", f"{whole['steps']:,.0f}"], ["samples seen", f"{whole['samples seen']:,.0f}"]]
    if whole["epochs"] is not None:
        rows.append(["epochs", f"{whole['epochs']:.3g}"])
    rows.append(["read", _bytes(plan.data["bytes per run"])])
    rows.append(["wall clock", _duration(float(whole["seconds"] or 0))])
    rows.append(["accelerator hours", f"{whole['accelerator hours']:,.4g}"])
    if whole["cost"] is not None:
        rows.append(["cost, in the price's currency", f"{whole['cost']:,.0f}"])
    return _table("The run", ["", ""], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: bool = True) -> Table:
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, show_header=any(columns)
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value else ""


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:,.4g} {unit}"
        value /= 1000
    return f"{value:,.4g} PB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.2f} days"
