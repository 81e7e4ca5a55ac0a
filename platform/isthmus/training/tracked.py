"""The MLflow run of one training."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from isthmus import registry, storage
from isthmus.registry import manifest
from isthmus.training.preflight import Plan, read_json


def control_tags(plan: Plan) -> dict[str, str]:
    """What marks the run and the model of a control; empty for others."""
    return {"isthmus.control": "shuffled_pairs"} if plan.run.data.shuffled_pairs else {}


class Tracked:
    """The MLflow run of this training, opened in the background while the workers start."""

    def __init__(self, plan: Plan, local: Path) -> None:
        self.plan, self._file = plan, local / "mlflow-run.json"
        self._lock = threading.Lock()
        self._id: str | None = None

    def run(self) -> tuple[str, str]:
        """(tracking URI, run id)."""
        with self._lock:
            if self._id is None:
                self._id = self._open()
            return self.plan.uri, self._id

    def close(self, status: str) -> None:
        """Mark the run as ended, if it was ever opened; a server that is away is not worth a second error."""
        if self._id is not None:
            with contextlib.suppress(Exception):
                registry.end_run(self.plan.uri, self._id, status)

    def _open(self) -> str:
        plan, stored = self.plan, read_json(str(self._file)) or {}
        known = stored.get("run_id") if stored.get("uri") == plan.uri else None
        tags = {"isthmus.run": plan.run.name, "isthmus.storage": plan.run.storage, "isthmus.digest": plan.digest}
        tags |= control_tags(plan)
        run_id = registry.start_run(plan.uri, plan.run.tracking.experiment, plan.run.name, run_id=known, tags=tags)
        storage.write_bytes(str(self._file), json.dumps({"uri": plan.uri, "run_id": run_id}).encode())
        lineage = manifest.flatten({"lineage": dict(plan.lineage)})
        registry.log_params(plan.uri, run_id, {**manifest.flatten(plan.run.model_dump(mode="json")), **lineage})
        return run_id
