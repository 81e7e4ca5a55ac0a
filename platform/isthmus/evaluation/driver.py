"""One evaluation: resolve the model, run the tasks, write and log figures with all that they were measured under."""

from __future__ import annotations

import json
import logging
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import isthmus
from isthmus import storage
from isthmus.config import EvaluateConfig, anchored
from isthmus.contracts import ModelVersion
from isthmus.errors import ConfigError
from isthmus.evaluation import model as models
from isthmus.evaluation import tasks
from isthmus.evaluation.model import Loaded
from isthmus.evaluation.samples import HeldOut, read_bulk_captions
from isthmus.evaluation.tasks import Rows, TaskResult

LIBRARIES = ("torch", "transformers", "pycocoevalcap")
UNITS = "recalls and mAP are fractions of 1; BLEU, ROUGE-L, METEOR and CIDEr-D in natural scale (papers print x100)"

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, *, loaded: Loaded | None = None) -> dict[str, Any]:
    """Held-out figures of one model.

    Args:
        config: what is measured; every task adds its figures to one flat result.
        loaded: a model to score instead of loading ``config.model``.

    Returns:
        Figures by name (``tr_at_1``, ``ir_at_10``, ``r_mean``, ``cider``, ``cider_permuted``, ...), chance values
        beside them, and the facts: data and its digest, counts scored, tie policy, prompt, beams, versions and
        ``comparable_to_paper`` (always False: neither weights nor splits are a paper's).

    Raises:
        RegistryError: the model cannot be found.
        ConfigError: a task that the model's method cannot do.
        DataError: samples missing or doubled, captions of other data, broken embeddings.
    """
    config = anchored(config)
    if not config.tasks:
        raise ConfigError("'tasks' is empty.", "Name retrieval, captioning or both.")
    held_out = HeldOut(config.data, config.limit, config.batch, config.cache)
    written = read_bulk_captions(config.captions, held_out.manifest) if config.captions else None
    version = loaded.version if loaded else models.resolve(config)
    if loaded is None and (written is None or set(config.tasks) != {"captioning"}):
        loaded = models.load(version, with_vision=config.cache is None)
    results = list[TaskResult]()
    for task in dict.fromkeys(config.tasks):
        if task == "retrieval":
            assert loaded is not None
            results.append(tasks.retrieval(loaded, held_out, config))
        else:
            results.append(tasks.captioning(loaded, held_out, config, written))
    figures = {name: value for result in results for name, value in result.metrics.items()}
    facts = {name: value for result in results for name, value in result.facts.items()}
    outcome = {**figures, **_common(config, held_out, version), **facts}
    _keep(config, version, outcome, figures, _merged(results))
    return outcome


def _common(config: EvaluateConfig, held_out: HeldOut, version: ModelVersion) -> dict[str, Any]:
    known = f"models:/{version.name}/{version.version}" if version.name and version.version else version.uri
    return {
        "model": known,
        "data": config.data,
        "data_digest": held_out.manifest.digest,
        "split": config.data.rstrip("/").rsplit("/", 1)[-1],
        "samples": len(held_out.rows),
        "unreadable": len(held_out.failures),
        "limit": config.limit,
        "tasks": ", ".join(config.tasks),
        "seed": config.seed,
        "units": UNITS,
        "comparable_to_paper": False,
        "versions": ", ".join(
            [f"isthmus {isthmus.__version__}", *(f"{name} {metadata.version(name)}" for name in LIBRARIES)]
        ),
    }


def _merged(results: list[TaskResult]) -> Rows:
    names = dict.fromkeys(name for result in results for columns in result.rows.values() for name in columns)
    rows: Rows = {}
    for result in results:
        for image_id, columns in result.rows.items():
            rows.setdefault(image_id, {"id": image_id, **dict.fromkeys(names)}).update(columns)
    return rows


def _keep(
    config: EvaluateConfig, version: ModelVersion, outcome: dict[str, Any], figures: dict[str, float], rows: Rows
) -> None:
    """Writes metrics.json and rows.parquet to ``out`` and to the MLflow run that made the model."""
    with tempfile.TemporaryDirectory() as folder:
        metrics_file, rows_file = Path(folder, "metrics.json"), Path(folder, "rows.parquet")
        metrics_file.write_text(json.dumps(outcome, indent=2, ensure_ascii=False), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(list(rows.values())), rows_file)
        if config.out:
            storage.make_dirs(config.out)
            for file in (rows_file, metrics_file):
                storage.write_bytes(storage.join(config.out, file.name), file.read_bytes())
        _log(config, version, figures, Path(folder))


def _log(config: EvaluateConfig, version: ModelVersion, figures: dict[str, float], folder: Path) -> None:
    from isthmus.registry import store

    run_id = store.run_id_of(version)
    if run_id is None:
        log.info("%s is a bare folder without a tracked run: the figures are not logged.", version.uri)
        return
    uri = store.tracking_uri(config.tracking)
    store.log_metrics(uri, run_id, {f"eval/{name}": value for name, value in figures.items()})
    store.log_artifacts(uri, run_id, folder, f"evaluation/{'-'.join(config.tasks)}")
