"""The model registry: the only place, with the training's metrics shipper, that talks to MLflow."""

from isthmus.registry.models import list_models, promote, register, resolve, run_id_of, show_model
from isthmus.registry.store import (
    check_tracking,
    end_run,
    log_artifacts,
    log_metrics,
    log_params,
    start_run,
    tracking_uri,
)

__all__ = [
    "check_tracking",
    "end_run",
    "list_models",
    "log_artifacts",
    "log_metrics",
    "log_params",
    "promote",
    "register",
    "resolve",
    "run_id_of",
    "show_model",
    "start_run",
    "tracking_uri",
]
