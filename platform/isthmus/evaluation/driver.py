"""One evaluation: resolve the model, run the tasks, write and log figures with all that they were measured under."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from isthmus.evaluation import java
from isthmus.evaluation import model as models
from isthmus.evaluation.held import Held, Rows, TaskResult
from isthmus.evaluation.model import Loaded, LoadVersion
from isthmus.evaluation.pool import Actors, Here
from isthmus.evaluation.protocol import differences
from isthmus.evaluation.samples import BulkCaptions, read_bulk_captions
from isthmus.evaluation.sources import IndexedSource, Source, open_source
from isthmus.evaluation.tasks import TASKS
from isthmus.evaluation.writing_tasks import captioning

LIBRARIES = ("torch", "transformers", "pycocoevalcap")
UNITS = (
    "recalls, mAP, accuracies and AUC are fractions of 1; BLEU, ROUGE-L, METEOR, SPICE and CIDEr-D in natural scale "
    "(papers print x100)"
)

log = logging.getLogger(__name__)


def evaluate(
    config: EvaluateConfig, *, loaded: Loaded | None = None, load: Callable[[], Loaded] | None = None
) -> dict[str, Any]:
    """Held-out figures of one model.

    Args:
        config: what is measured; every task adds its figures to one flat result.
        loaded: a model to score in this process instead of loading ``config.model``.
        load: makes a model to score, in this process or in every worker; picklable.

    Returns:
        Figures by name (``tr_at_1``, ``ir_at_10``, ``r_mean``, ``cider``, ``cider_permuted``, ``vqa_accuracy``,
        ``top_1``, ``itm_auc``, ...), chance or prior values beside them, and the facts: data and its digest, counts
        scored, tie policy, prompt, beams, versions, ``not_computed`` with reasons, ``comparable_to_paper`` (False)
        and ``not_comparable_because``. ``results.jsonl`` in ``out`` has one row per task with its own facts alone.

    Raises:
        RegistryError: the model cannot be found.
        ConfigError: a task that the model's method cannot do, or METEOR or SPICE demanded where they cannot run.
        DataError: ids missing or doubled in the data or in the workers' answers, captions of other data, broken
            embeddings.
    """
    config = anchored(config)
    _check(config, loaded)
    version = _version(config, loaded, load)
    with _held(config, version, loaded, load) as (held, written):
        done: dict[str, TaskResult] = {task: _run(task, held, written) for task in dict.fromkeys(config.tasks)}
        common = _common(config, held, version)
    for failure in list(held.failures.values())[:3]:
        log.warning("Not scored: %s in %s: %s", failure.key, failure.shard, failure.reason)
    results = [_row(task, result, common, held) for task, result in done.items()]
    outcome = _flat(done, results, common)
    figures = {name: value for result in done.values() for name, value in result.metrics.items()}
    _keep(config, version, outcome, results, figures, done)
    return outcome


def _check(config: EvaluateConfig, loaded: Loaded | None) -> None:
    """What can be refused before a model is loaded."""
    if not config.tasks:
        raise ConfigError("'tasks' is empty.", f"Name some of: {', '.join(TASKS)}.")
    if "captioning" in config.tasks:
        if config.meteor is True and not java.has_java():
            raise ConfigError("METEOR needs Java, and there is no 'java' on the path.", "Install it, or meteor=auto.")
        if config.spice_jars:
            java.check_spice(config.spice_jars)
    if config.workers and loaded is not None:
        raise ConfigError("A model that is loaded here cannot work in Ray actors.", "Give 'load', or workers=0.")


def _version(config: EvaluateConfig, loaded: Loaded | None, load: Callable[[], Loaded] | None) -> ModelVersion:
    if loaded is not None:
        return loaded.version
    return ModelVersion("", "", "", config.model) if load is not None else models.resolve(config)


@contextmanager
def _held(
    config: EvaluateConfig, version: ModelVersion, loaded: Loaded | None, load: Callable[[], Loaded] | None
) -> Iterator[tuple[Held, BulkCaptions | None]]:
    """The data and who works on it."""
    from isthmus.ray_session import ray_session

    make = load or LoadVersion(version, config)
    wanted = not config.captions or set(config.tasks) != {"captioning"}  # captions that are there need no model
    with ray_session(config.workers * config.cpus_per_worker) if config.workers and wanted else nullcontext():
        if not config.workers or not wanted:
            model = (loaded or make()) if wanted else loaded
            source = open_source(config, model.vision if model else None)
            yield Held(source, Here(model, source, config), config), _written(config, source)
            return
        source = open_source(config)
        written = _written(config, source)
        actors = Actors(make, source, config)
        try:
            yield Held(source, actors, config), written
        finally:
            actors.close()


def _written(config: EvaluateConfig, source: Source) -> BulkCaptions | None:
    if not config.captions:
        return None
    assert isinstance(source, IndexedSource)  # the configuration's own rule
    return read_bulk_captions(config.captions, source.manifest)


def _run(task: str, held: Held, written: BulkCaptions | None) -> TaskResult:
    return captioning(held, written) if task == "captioning" else TASKS[task](held)


def _common(config: EvaluateConfig, held: Held, version: ModelVersion) -> dict[str, Any]:
    known = f"models:/{version.name}/{version.version}" if version.name and version.version else version.uri
    source, about = held.source, held.runner.about()
    return {
        "model": known,
        "model_bases": ", ".join(about.bases),
        "model_tokenizers": about.tokenizers,
        "data": source.root,
        "data_layout": config.layout.kind if config.layout else "indexed",
        "data_digest": source.digest,
        "split": source.split,
        "samples": len(held.rows),
        "unreadable": len(held.failures),
        "unreadable_first": ", ".join(f"{f.key}: {f.reason}" for f in list(held.failures.values())[:3]),
        "limit": config.limit,
        "tasks": ", ".join(config.tasks),
        "batch": config.batch,
        "seed": config.seed,
        "units": UNITS,
        "comparable_to_paper": False,
        "versions": ", ".join(
            [f"isthmus {isthmus.__version__}", *(f"{name} {metadata.version(name)}" for name in LIBRARIES)]
        ),
    }


def _row(task: str, result: TaskResult, common: dict[str, Any], held: Held) -> dict[str, Any]:
    reasons = differences(task, result.facts, held.config, len(held.failures))
    return {
        "task": task,
        **{name: value for name, value in common.items() if name != "tasks"},
        **result.facts,
        "not_computed": result.not_computed,
        "not_comparable_because": "; ".join(reasons),
        "metrics": result.metrics,
    }


def _flat(done: dict[str, TaskResult], results: list[dict[str, Any]], common: dict[str, Any]) -> dict[str, Any]:
    """All tasks in one mapping; a fact that two tasks have differently is told by task."""
    out: dict[str, Any] = {name: value for result in done.values() for name, value in result.metrics.items()}
    out |= common
    for task, result in done.items():
        for name, value in result.facts.items():
            out[name if out.get(name, value) == value else f"{task}_{name}"] = value
    out["not_computed"] = {name: why for result in done.values() for name, why in result.not_computed.items()}
    because = {row["task"]: row["not_comparable_because"] for row in results}
    out["not_comparable_because"] = next(iter(because.values())) if len(because) == 1 else because
    return out


def _merged(results: list[TaskResult]) -> Rows:
    names = dict.fromkeys(name for result in results for columns in result.rows.values() for name in columns)
    rows: Rows = {}
    for result in results:
        for image_id, columns in result.rows.items():
            rows.setdefault(image_id, {"id": image_id, **dict.fromkeys(names)}).update(columns)
    return rows


def _keep(
    config: EvaluateConfig,
    version: ModelVersion,
    outcome: dict[str, Any],
    results: list[dict[str, Any]],
    figures: dict[str, float],
    done: dict[str, TaskResult],
) -> None:
    """Writes the figures, one row per task, one row per image and the tasks' own files to ``out`` and to the MLflow
    run that made the model; metrics.json comes last."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder, "rows.parquet")
        pq.write_table(pa.Table.from_pylist(list(_merged(list(done.values())).values())), rows_file)
        files = [rows_file]
        for name, value in {name: v for result in done.values() for name, v in result.files.items()}.items():
            files.append(_write(Path(folder, name), json.dumps(value, ensure_ascii=False)))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results)
        files.append(_write(Path(folder, "results.jsonl"), lines))
        files.append(_write(Path(folder, "metrics.json"), json.dumps(outcome, indent=2, ensure_ascii=False)))
        if config.out:
            storage.make_dirs(config.out)
            for file in files:
                storage.write_bytes(storage.join(config.out, file.name), file.read_bytes())
        _log(config, version, figures, Path(folder))


def _write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def _log(config: EvaluateConfig, version: ModelVersion, figures: dict[str, float], folder: Path) -> None:
    from isthmus.registry import store

    run_id = store.run_id_of(version)
    if run_id is None:
        log.info("%s is a bare folder without a tracked run: the figures are not logged.", version.uri)
        return
    uri, tasks = store.tracking_uri(config.tracking), "-".join(config.tasks)
    store.log_metrics(uri, run_id, {f"eval/{name}": value for name, value in figures.items()})
    store.log_artifacts(uri, run_id, folder, f"evaluation/{tasks}")
    # The model's run shows the newest figures. Those of other data, or ranked in another way, stand below it for good.
    child = store.start_child(uri, run_id, f"evaluate {tasks}")
    asked = config.model_dump(mode="json", exclude={"tracking"}, exclude_none=True)
    store.log_params(uri, child, {name: value for name, value in asked.items() if value not in ("", [], {})})
    store.log_metrics(uri, child, figures)
    store.log_artifacts(uri, child, folder)
    store.end_run(uri, child)
