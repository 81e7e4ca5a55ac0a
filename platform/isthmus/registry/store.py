"""MLflow: where runs and models are, and every call this package makes of it.

A tracking server that is away must be named at once, so each public function checks it before MLflow's own client,
which would retry for minutes, is asked.
"""

from __future__ import annotations

import functools
import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from isthmus.config import TrackingConfig, absolute
from isthmus.errors import RegistryError

DEFAULT_URI = "sqlite:///runs/mlflow.db"


def tracking_uri(tracking: TrackingConfig | None = None) -> str:
    """The recipe's ``tracking.uri``, else ``MLFLOW_TRACKING_URI``, else SQLite in ``runs`` of the working directory.

    Raises:
        ConfigError: a relative SQLite path in a submitted job, whose working directory is thrown away.
    """
    configured = (tracking.uri if tracking else None) or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute("tracking.uri", configured or DEFAULT_URI, written=True)


def check_tracking(uri: str, timeout_s: float = 5.0) -> None:
    """Fail within seconds when the tracking store cannot be used.

    Raises:
        RegistryError: no server answers at an http(s) ``uri``, it answers with an error, or the folder of a SQLite
            file cannot be written.
    """
    scheme = urlparse(uri).scheme
    if scheme in ("http", "https"):
        _check_server(uri, timeout_s)
    elif scheme == "sqlite":
        file = database_file(uri)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(f"The tracking store {uri} cannot be made: {error}.", "Set tracking.uri.") from error
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise RegistryError(f"The tracking store {uri} cannot be written.", "Set tracking.uri or its permissions.")


def _check_server(uri: str, timeout_s: float) -> None:
    mend = "Start it (mlflow server), or set tracking.uri or MLFLOW_TRACKING_URI to one that runs."
    request = urllib.request.Request(f"{uri.rstrip('/')}/health")  # noqa: S310 - http(s) only, see the caller
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):  # noqa: S310
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # a server that asks for credentials is there; MLflow's client sends them
        raise RegistryError(f"The tracking server {uri} answered with HTTP {error.code}.", mend) from error
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise RegistryError(f"No tracking server answers at {uri} ({reason}).", mend) from error


def database_file(uri: str) -> Path:
    """The file of a ``sqlite:///`` URI."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute()


@functools.cache
def quiet_mlflow() -> Any:
    """The mlflow module, without banners, migration logs and telemetry, and with short retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    import mlflow.pyfunc

    for name in ("mlflow", "alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    return mlflow


def client(uri: str) -> Any:
    """An MlflowClient for ``uri``, checked to be within reach.

    Raises:
        RegistryError: see :func:`check_tracking`.
    """
    check_tracking(uri)
    return quiet_mlflow().MlflowClient(tracking_uri=uri, registry_uri=uri)


def start_run(
    uri: str, experiment: str, name: str, *, run_id: str | None = None, tags: Mapping[str, str] | None = None
) -> str:
    """Id of the MLflow run ``name``; an earlier ``run_id`` is opened again when it still exists.

    Artifacts of a SQLite store lie beside it, in ``mlartifacts``.
    """
    api = client(uri)
    if run_id and (known := _existing_run(api, run_id)):
        api.update_run(known, status="RUNNING")
        return known
    found = api.get_experiment_by_name(experiment)
    if found is None:
        place = None
        if uri.startswith("sqlite:"):
            place = (database_file(uri).parent / "mlartifacts" / experiment).as_uri()
        experiment_id = api.create_experiment(experiment, artifact_location=place)
    else:
        experiment_id = found.experiment_id
    run = api.create_run(experiment_id, run_name=name, tags=dict(tags or {}))
    return str(run.info.run_id)


def start_child(uri: str, parent_id: str, name: str) -> str:
    """Id of a new run that MLflow shows below ``parent_id``."""
    api = client(uri)
    parent = api.get_run(parent_id)
    run = api.create_run(parent.info.experiment_id, run_name=name, tags={"mlflow.parentRunId": parent_id})
    return str(run.info.run_id)


def _existing_run(api: Any, run_id: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        run = api.get_run(run_id)
    except MlflowException:
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def end_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Close a run; ``status`` is FINISHED, FAILED or KILLED."""
    client(uri).set_terminated(run_id, status=status)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Parameters of a run, values cut at MLflow's 6,000 characters. A parameter that a resumed run changed is kept
    as first logged, because MLflow's parameters are write-once; the recipe among the artifacts has the new value."""
    from mlflow.entities import Param

    api = client(uri)
    known = api.get_run(run_id).data.params
    rows = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in known]
    for start in range(0, len(rows), 100):
        api.log_batch(run_id, params=rows[start : start + 100])


def log_metrics(uri: str, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """One row of metrics, for example an evaluation's figures on the run of the model that was evaluated."""
    import time

    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    rows = [Metric(key, float(value), now, step) for key, value in metrics.items()]
    client(uri).log_batch(run_id, metrics=rows)


def log_artifacts(uri: str, run_id: str, path: str | Path, artifact_path: str | None = None) -> None:
    """A file or a folder's content among a run's artifacts."""
    api, source = client(uri), Path(path)
    if source.is_dir():
        api.log_artifacts(run_id, str(source), artifact_path)
    else:
        api.log_artifact(run_id, str(source), artifact_path)


def __getattr__(name: str) -> Any:
    # The brief way in: `from isthmus.registry.store import resolve` works as from the package.
    if name in ("register", "resolve", "list_models", "show_model", "promote", "run_id_of"):
        from isthmus.registry import models

        return getattr(models, name)
    raise AttributeError(name)
