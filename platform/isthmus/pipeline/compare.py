"""Several trained and evaluated models side by side: one table for people, machines and documentation.

Nothing is computed here; every figure is a field of an earlier step's result, and one that is not there is an error,
never a blank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from isthmus.config import Config
from isthmus.errors import ConfigError, DataError, nearest

Result = dict[str, Any]
Columns = Mapping[str, str | Sequence[str]]

COLUMNS: Columns = {
    **{f"{way}_r{k}": f"evaluate.{way}_at_{k}" for k in (1, 5, 10) for way in ("tr", "ir")},
    "chance_r1": ("evaluate.tr_at_1_chance", "evaluate.ir_at_1_chance"),
    "chance_r5": ("evaluate.tr_at_5_chance", "evaluate.ir_at_5_chance"),
    "images": "evaluate.images",
    "captions": "evaluate.captions",
    "rerank": "evaluate.rerank",
    "seconds": "train.seconds",
    "stepping_seconds": "train.stepping_seconds",
    "evaluation_seconds": "evaluate.step_seconds",
    "trainable_parameters": "train.trainable_parameters",
    "peak_memory_gib": "train.peak_memory_gib",
    "steps": "train.steps",
    "global_batch": "train.global_batch",
    "samples_seen": "train.samples_seen",
    "seed": "train.seed",
    "uri": "train.uri",
    "data_digest": "evaluate.data_digest",
}
"""Figure -> ``train.`` or ``evaluate.`` and a field of that step's result. Of several fields the largest is taken."""


class CompareRow(Config):
    """A trained and evaluated model in a comparison."""

    method: str = Field(min_length=1, description="what the row is called")
    kind: Literal["method", "baseline", "control"] = "method"
    train: str = Field(description="id of the earlier step that trained it")
    evaluate: str = Field(description="id of the earlier step that evaluated it")
    about: str = Field("", description="one sentence for the reader")


class CompareOptions(Config):
    """Which models are compared by which figures. ``train.FIELD`` and ``evaluate.FIELD`` are fields of the results of a
    row's two steps."""

    title: str
    lead: str = Field("", description="a sentence or two under the title")
    rows: tuple[CompareRow, ...] = Field(min_length=1)
    columns: dict[str, str] = Field(
        {}, description="further figures, or other sources of the known ones, e.g. {cka: evaluate.cka}"
    )
    table: tuple[str, ...] = Field(
        ("tr_r1", "ir_r1", "tr_r5", "ir_r5", "seconds", "samples_seen", "trainable_parameters", "peak_memory_gib"),
        description="figures that people see, in this order; report.json has all",
    )
    quality: tuple[str, ...] = Field(("tr_r1", "ir_r1"), min_length=1, description="figures that are drawn as bars")
    chance: str = Field("chance_r1", description="the figure that is their chance")
    against: dict[str, bool] = Field(
        {"seconds": False, "trainable_parameters": True},
        description="costs that the mean of 'quality' is drawn against, and whether the scale is logarithmic",
    )

    @field_validator("columns")
    @classmethod
    def _fields_of_a_step(cls, value: dict[str, str]) -> dict[str, str]:
        for name, field in value.items():
            if field.partition(".")[0] not in ("train", "evaluate") or not field.partition(".")[2]:
                raise ValueError(f"'{name}' comes from '{field}'; expected train.FIELD or evaluate.FIELD")
        return value

    @model_validator(mode="after")
    def _names_are_clear(self) -> CompareOptions:
        labels = [row.method for row in self.rows]
        if doubled := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two rows are called '{doubled[0]}'")
        known = {*COLUMNS, *self.columns}
        for name in (*self.table, *self.quality, self.chance, *self.against):
            if name not in known:
                raise ValueError(f"no figure is called '{name}'.{nearest(name, known)}")
        return self


def write_comparison(out: Path, results: Mapping[str, Result], options: CompareOptions) -> Result:
    """Writes ``report.json`` (one object per row), ``report.html``, ``report.md`` and ``plots/*.svg`` below ``out``.

    Raises:
        ConfigError: a row names a step that has not run.
        DataError: a step's result lacks a figure, or two rows were evaluated on different data.
    """
    from isthmus.pipeline.compare_page import markdown, page, plots, show

    rows = compared(results, options)
    drawn = plots(rows, options)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (out / "plots" / f"{name}.svg").write_text(svg, encoding="utf-8")
    (out / "report.md").write_text(markdown(rows, options, drawn), encoding="utf-8")
    (out / "report.html").write_text(page(rows, options, drawn), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    show(rows, options)
    files = {kind: str(out / f"report.{end}") for kind, end in (("html", "html"), ("json", "json"), ("markdown", "md"))}
    return {**files, "rows": len(rows)}


def compared(results: Mapping[str, Result], options: CompareOptions) -> list[Result]:
    """One flat object per row, in the order asked for.

    Raises:
        ConfigError, DataError: as :func:`write_comparison`.
    """
    columns = {**COLUMNS, **options.columns}
    rows = [_row(results, row, columns) for row in options.rows]
    for row, asked in zip(rows, options.rows, strict=True):
        if row["data_digest"] != rows[0]["data_digest"]:
            raise DataError(
                f"Step '{asked.evaluate}' measured '{asked.method}' on other data than step "
                f"'{options.rows[0].evaluate}' ({row['data_digest'][:12]} and {rows[0]['data_digest'][:12]}).",
                "Evaluate all rows on the same 'data'.",
            )
        for count in ("images", "captions"):
            if row[count] != rows[0][count]:
                raise DataError(
                    f"Step '{asked.evaluate}' measured '{asked.method}' on {row[count]} {count}, and step "
                    f"'{options.rows[0].evaluate}' on {rows[0][count]}: that alone tells their figures apart.",
                    "Give all evaluations the same 'limit'.",
                )
    return rows


def _row(results: Mapping[str, Result], row: CompareRow, columns: Columns) -> Result:
    found: Result = {"method": row.method, "kind": row.kind, "about": row.about}
    for name, fields in columns.items():
        asked = (fields,) if isinstance(fields, str) else fields
        values = [_figure(results, row, field, name) for field in asked]
        found[name] = values[0] if len(values) == 1 else max(values)
        if len(asked) == 1 and (interval := _interval(results, row, asked[0])):
            found[f"{name}_interval"] = interval
    return found


def _interval(results: Mapping[str, Result], row: CompareRow, field: str) -> list[float] | None:
    """The evaluation's own 95 % interval of a figure that it gives one for."""
    role, _, key = field.partition(".")
    return results[row.evaluate].get(f"{key}_ci95") if role == "evaluate" else None


def _figure(results: Mapping[str, Result], row: CompareRow, field: str, name: str) -> Any:
    role, _, key = field.partition(".")
    step = {"train": row.train, "evaluate": row.evaluate}[role]
    if step not in results:
        raise ConfigError(
            f"The row '{row.method}' looks at the step '{step}', which has not run.{nearest(step, results)}",
            f"Steps that have run: {', '.join(results) or 'none'}.",
        )
    value = results[step].get(key)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        said = "gives no" if value is None else f"gives {value} as"
        raise DataError(
            f"Step '{step}' {said} '{key}', which is the figure '{name}' of '{row.method}'."
            f"{nearest(key, results[step])}",
            "If it ran under an earlier version, delete its record in the pipeline's folder steps/ and its run folder, "
            "and run the pipeline again.",
        )
    return value


def unknown_steps(options: CompareOptions, earlier: Sequence[str]) -> Iterator[str]:
    """Sentences about rows that name no earlier step, for a check before anything runs."""
    for row in options.rows:
        for role in ("train", "evaluate"):
            step = getattr(row, role)
            if step not in earlier:
                yield f"the row '{row.method}' names '{step}' in '{role}', and no earlier step has this id." + nearest(
                    step, earlier
                )
