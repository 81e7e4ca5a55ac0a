"""What selecting encoders and curating pairs found, as HTML pages."""

from __future__ import annotations

from isthmus import storage
from isthmus.alignment.curate import CurateReport
from isthmus.alignment.select import PairRow, SelectReport
from isthmus.pipeline.page import render
from isthmus.pipeline.plots import bars, heat_map, histogram


def write_select_page(report: SelectReport) -> str:
    """The page of ``isthmus align select``, beside its report; returns its URL."""
    best = report.pairs[0]
    page = render(
        "select.html",
        title="Isthmus: which encoders go together",
        lead=f"CKA of frozen encoders over {report.samples:,} pairs of {report.data}, before anything is trained.",
        tiles=[
            {"name": "most alike", "value": f"{best.cka:.3f}", "note": f"{best.vision}, {best.text}", "state": ""},
            {
                "name": "permuted pairs",
                "value": f"{best.permuted:.3f}",
                "note": "the same, pairs mixed up",
                "state": "",
            },
            {"name": "pairs", "value": f"{report.samples:,}", "note": f"drawn with seed {report.seed}", "state": ""},
        ],
        plots=[svg for kernel in dict.fromkeys(row.kernel for row in report.pairs) for svg in _plots(report, kernel)],
        report=report,
    )
    url = storage.join(report.out, "select.html")
    storage.write_bytes(url, page.encode())
    return url


def _plots(report: SelectReport, kernel: str) -> list[str]:
    rows = [row for row in report.pairs if row.kernel == kernel]
    of = {(row.vision, row.text): row for row in rows}
    images, texts = (list(dict.fromkeys(getattr(row, side) for row in rows)) for side in ("vision", "text"))
    table = [[of[image, text].cka for text in texts] for image in images]
    series = {
        "without bias": {_pair(row): row.cka for row in rows[:8]},
        "permuted": {_pair(row): row.permuted for row in rows[:8]},
        "biased": {_pair(row): row.biased for row in rows[:8]},
        "biased, permuted": {_pair(row): row.biased_permuted for row in rows[:8]},
    }
    return [
        heat_map(f"CKA without bias, {kernel} kernel, n = {rows[0].n}", images, texts, table),
        bars(f"Beside permuted pairs, {kernel} kernel, n = {rows[0].n}", series, unit="CKA"),
    ]


def _pair(row: PairRow) -> str:
    return f"{row.vision}\n{row.text}"


def write_curation_page(report: CurateReport) -> str:
    """The page of ``isthmus data curate``, beside its report; returns its URL."""
    rows = sorted(report.classes, key=lambda row: (-row.taken, row.name))
    shown = [*rows[:20], *rows[20:][-20:]]
    scores = {"best of a class": [row.best for row in rows if row.best is not None]}
    scores["last taken"] = [row.last for row in rows if row.last is not None]
    page = render(
        "curation.html",
        title="Isthmus: a choice by concept",
        lead=f"Samples of {report.data} by class, the rarest class served first, each sample once.",
        tiles=[
            {"name": "chosen", "value": f"{report.chosen:,}", "note": f"of {report.samples:,} samples", "state": ""},
            {"name": "full", "value": f"{report.full:,}", "note": f"of {len(rows):,} classes", "state": ""},
            {"name": "short", "value": f"{report.short:,}", "note": "classes with fewer samples", "state": ""},
            {"name": "empty", "value": f"{report.empty:,}", "note": "classes without a sample", "state": ""},
            {"name": "unreadable", "value": f"{report.unreadable:,}", "note": "set aside", "state": ""},
        ],
        plots=[
            bars("Samples of a class, the most and the fewest", {"taken": {r.name: r.taken for r in shown}}, "samples"),
            histogram("Samples of a class", {"classes": [row.taken for row in rows]}, "samples taken"),
            histogram("Cosine to the class", scores, "cosine"),
        ],
        report=report,
    )
    url = storage.join(report.out, "curation.html")
    storage.write_bytes(url, page.encode())
    return url
