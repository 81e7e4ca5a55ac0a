"""What a pipeline reached, as one HTML page for people and one flat JSON object for machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from isthmus.contracts import Reference
from isthmus.data.manifest import Manifest
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.transforms import decode_image
from isthmus.pipeline.page import render, thumbnail
from isthmus.pipeline.plots import Curve, bars, loss_curves
from isthmus.registry.store import tracking_uri

if TYPE_CHECKING:
    from isthmus.pipeline.steps import ReportOptions

Result = dict[str, Any]
_PACKAGES = ("isthmus", "torch", "ray", "deepspeed", "transformers", "timm", "mlflow", "pyarrow")
_CARDS, _EXAMPLES = 24, 6


def write_report(out: Path, results: Mapping[str, Result], options: ReportOptions) -> Result:
    """Writes ``report.html`` and ``report.json`` below ``out``.

    Raises:
        KeyError: an option names a step that has not run.
    """
    figures = _figures(results, options)
    (out / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    page = _page(out, results, options, figures)
    (out / "report.html").write_text(page, encoding="utf-8")
    return {"html": str(out / "report.html"), "json": str(out / "report.json"), **figures}


def _figures(results: Mapping[str, Result], options: ReportOptions) -> Result:
    retrieval, projector = results[options.retrieval], results[options.projector]
    scores, captions = results[options.scores], results[options.captions]
    return {
        "retrieval_images": int(retrieval["images"]),
        "tr_r1": retrieval["tr_at_1"],
        "ir_r1": retrieval["ir_at_1"],
        "tr_r5": retrieval["tr_at_5"],
        "ir_r5": retrieval["ir_at_5"],
        "projector_tr_r5": projector["tr_at_5"],
        "projector_ir_r5": projector["ir_at_5"],
        "chance_r5": max(retrieval["tr_at_5_chance"], retrieval["ir_at_5_chance"]),
        "cider": scores["cider"],
        "cider_permuted": scores["cider_permuted"],
        "captioned": captions["captioned"],
        "expected": captions["expected"],
        "quarantined": captions["quarantined"],
        "seconds": round(sum(r["step_seconds"] for r in results.values()), 1),
        "seed": options.seed,
    }


def _page(out: Path, results: Mapping[str, Result], options: ReportOptions, figures: Result) -> str:
    pictures = _Pictures(options.data)
    uri = tracking_uri(options.tracking)
    return render(
        "report.html",
        title=f"Isthmus: {out.name}",
        lead="One thread from image-text shards to a registered, bulk-captioning, served model, on frozen backbones.",
        tiles=list(_tiles(figures)),
        curves=[svg for name in options.trained if (svg := _curves(Path(results[name]["run"]), name))],
        retrieval_images=figures["retrieval_images"],
        retrieval_plot=_retrieval_plot(results, options),
        examples=list(_examples(results[options.retrieval], pictures)),
        cards=list(_cards(results[options.scores], pictures)),
        served=_served(results, options, pictures),
        figures={k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()},
        steps=[{"id": k, "seconds": r["step_seconds"], "output": _output(r)} for k, r in results.items()],
        mlflow_command=f"mlflow ui --backend-store-uri {uri}",
        links=_links(uri, results, options),
        versions={name: version(name) for name in _PACKAGES},
    )


def _tiles(figures: Result) -> Iterator[dict[str, str]]:
    chance = figures["chance_r5"]
    for name, tr, ir, aim in (
        ("Q-Former R@5", figures["tr_r5"], figures["ir_r5"], 8),
        ("projector R@5", figures["projector_tr_r5"], figures["projector_ir_r5"], 40),
    ):
        times = min(tr, ir) / chance
        yield {
            "name": name,
            "value": f"{tr:.1%} / {ir:.1%}",
            "note": f"image to text / text to image; {times:.0f}x chance (aim {aim}x)",
            "state": "met" if times >= aim else "missed",
        }
    ratio = figures["cider"] / max(figures["cider_permuted"], 1e-9)
    yield {
        "name": "CIDEr-D",
        "value": f"{figures['cider']:.3f}",
        "note": f"{figures['cider_permuted']:.3f} on permuted images: {ratio:.1f}x (aim 2x)",
        "state": "met" if ratio >= 2 else "missed",
    }
    whole = figures["captioned"] + figures["quarantined"] == figures["expected"]
    yield {
        "name": "captioned in bulk",
        "value": f"{figures['captioned']} of {figures['expected']}",
        "note": f"{figures['quarantined']} unreadable, in quarantine",
        "state": "met" if whole else "missed",
    }
    yield {"name": "wall time", "value": f"{figures['seconds'] / 60:.1f} min", "note": "all steps", "state": ""}


def _curves(run: Path, title: str) -> str | None:
    """The run's loss parts from its spool, or None where the run left no rows."""
    spool = run / "metrics.jsonl"
    if not spool.is_file():
        return None
    rows = [json.loads(line) for line in spool.read_text(encoding="utf-8").splitlines()]
    names = dict.fromkeys(k for row in rows for k in row["metrics"] if k.startswith("loss_"))
    curves = {}
    for name in names:
        points = [(row["step"], row["metrics"][name]) for row in rows if name in row["metrics"]]
        curves[name.removeprefix("loss_")] = Curve(*zip(*points, strict=True))
    return loss_curves(title, curves, _references(run)) if curves else None


def _references(run: Path) -> dict[str, Reference]:
    file = run / "references.json"
    if not file.is_file():
        return {}
    flat = json.loads(file.read_text(encoding="utf-8"))
    parts = {key.rpartition(".")[0] for key in flat}
    return {p.removeprefix("loss_"): Reference(flat[f"{p}.chance"], flat[f"{p}.floor"]) for p in parts}


def _retrieval_plot(results: Mapping[str, Result], options: ReportOptions) -> str:
    first = results[options.retrieval]
    ways = [(way, k) for way in ("tr", "ir") for k in (1, 5, 10)]

    def series(result: Result, suffix: str = "") -> dict[str, float]:
        return {f"{way.upper()}@{k}": 100 * result[f"{way}_at_{k}{suffix}"] for way, k in ways}

    groups = {
        "Q-Former": series(first),
        "projectors": series(results[options.projector]),
        "chance": series(first, "_chance"),
    }
    return bars("Recall among the held-out pairs", groups)


def _examples(result: Result, pictures: _Pictures) -> Iterator[dict[str, Any]]:
    rows = pq.read_table(Path(result["out"]) / "rows.parquet").to_pylist()
    for row in _evenly(rows, _EXAMPLES):
        yield {
            "caption": row["captions"][0],
            "rank": row["ir_ranks"][0],
            "images": [{"src": pictures.of(k), "hit": k == row["key"], "key": k} for k in row["top_images"][:5]],
        }


def _cards(result: Result, pictures: _Pictures) -> Iterator[dict[str, str]]:
    rows = pq.read_table(Path(result["out"]) / "rows.parquet").to_pylist()
    for row in _evenly(rows, _CARDS):
        yield {"src": pictures.of(row["key"]), "said": row["caption"], "reference": row["references"][0]}


def _served(results: Mapping[str, Result], options: ReportOptions, pictures: _Pictures) -> dict[str, Any] | None:
    if options.serve is None:
        return None
    result = results[options.serve]
    return {**result, "src": pictures.of(result["key"])}


def _links(uri: str, results: Mapping[str, Result], options: ReportOptions) -> list[dict[str, str]]:
    """The registered models' pages in the MLflow web interface, on the port that ``mlflow ui`` opens."""
    base = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    models = [results[name]["uri"].removeprefix("models:/") for name in options.trained]
    return [
        {"name": model, "href": f"{base}/#/models/{model.replace('/', '/versions/')}"}
        for model in models
        if "/" in model
    ]


def _output(result: Result) -> str:
    return str(next((result[k] for k in ("uri", "out", "url", "html") if result.get(k)), ""))


def _evenly(rows: Sequence[Any], count: int) -> Sequence[Any]:
    return rows[:: max(1, len(rows) // count)][:count]


class _Pictures:
    """Thumbnails of a data set's images by key, as data URLs, read when asked for."""

    def __init__(self, data: str) -> None:
        self.manifest = Manifest.load(data)
        self.row_of = {key: row for row, key in enumerate(self.manifest.table.column("key").to_pylist())}

    def of(self, key: str) -> str:
        sample = next(iter(read_rows(self.manifest, [self.row_of[key]])))
        if not isinstance(sample, RawSample):
            return ""
        return thumbnail(decode_image(sample.image))
