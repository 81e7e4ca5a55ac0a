"""``fit``: from a recipe to a registered model. Checks, starts the workers, shows progress, registers the result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isthmus import registry, storage
from isthmus.config import ClusterConfig, RunConfig, anchored
from isthmus.contracts import ModelVersion
from isthmus.data.parallel import store_environment
from isthmus.errors import IsthmusError, RegistryError
from isthmus.ray_session import ray_session
from isthmus.training import preflight
from isthmus.training.alone import alone_in
from isthmus.training.cost import Cost
from isthmus.training.interrupt import interruptible
from isthmus.training.metrics import Shipper, Spool, mlflow_file_sender, mlflow_sender
from isthmus.training.preflight import Plan
from isthmus.training.tracked import Tracked, control_tags
from isthmus.training.watch import Watch
from isthmus.training.worker import Job, TrainingError, train_here, train_worker

log = logging.getLogger(__name__)

REFERENCES = "references.json"
"""In the run folder: ``loss_<part>.chance`` and ``loss_<part>.floor`` of every loss part, for reports."""


def fit(config: RunConfig, *, progress: bool = True) -> ModelVersion:
    """Train ``config`` to its last step, export, and register the model under ``config.model``.

    The same name in the same storage resumes from the newest whole checkpoint; a run that has already finished returns
    at once. Without a ``model`` section nothing is registered and the result's ``uri`` is the artefact's folder.

    Args:
        config: the recipe.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError, StorageError, DataError, RegistryError: found by the checks before anything starts.
        TrainingError: training itself cannot go on.
        KeyboardInterrupt: Ctrl-C; the workers are stopped first and the last checkpoint stays.
    """
    config = anchored(config)
    with alone_in(storage.join(config.storage, config.name)):
        return _fit(config, progress)


def _fit(config: RunConfig, progress: bool) -> ModelVersion:
    plan = preflight.check(config)
    if (facts := preflight.finished(plan)) and (version := _still_there(plan, facts)):
        return version
    preflight.write_recipe(plan)
    if plan.run.data.shuffled_pairs:
        log.warning(
            "Run '%s' is a control (data.shuffled_pairs): every image gets another one's captions. Its model is "
            "registered with the tag isthmus.control.",
            plan.run.name,
        )
    local = _local_folder(plan)
    with Cost(plan.folder, local / "metrics.jsonl") as cost:
        with ray_session(plan.run.cluster.most_workers * plan.run.cluster.cpus_per_worker):
            tracked = Tracked(plan, local)
            watch = _train(plan, local, tracked, progress)
        cost.exported(watch.facts.get("exported", {}))
        return _finish(plan, tracked, watch)


def _train(plan: Plan, local: Path, tracked: Tracked, progress: bool) -> Watch:
    """Run the worker group to its end; the watch holds what it said."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Spool)
    spool = actor.options(num_cpus=0, scheduling_strategy=here).remote(str(local / "metrics.jsonl"))
    parent = plan.parent.path if plan.parent else None
    job = Job(
        plan.run, plan.spec, plan.samples, parent, plan.lineage, spool, plan.cached, plan.sizes, store_environment()
    )
    senders = mlflow_sender(tracked.run), mlflow_file_sender(tracked.run)
    shipper = Shipper(local / "metrics.jsonl", local / "metrics.sent", *senders)
    watch = Watch(plan.run, spool, quarantine=local / "quarantine.jsonl", shown=progress)
    shipper.start()
    status = "FAILED"
    try:
        with watch:
            if plan.run.cluster.in_process:
                train_here(job)
            else:
                _run_trainer(plan.run, job)
        if (error := ray.get(spool.failure.remote())) is not None:
            raise error
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        watch.say(f"Stopped. The same command resumes run '{plan.run.name}' from its last checkpoint.")
        raise
    finally:
        missing = shipper.close(timeout_s=20.0 if status == "FINISHED" else 5.0)
        if missing:
            watch.say(
                f"{missing} rows of metrics could not be sent to {plan.uri} ({shipper.problem}); they are in "
                f"{local / 'metrics.jsonl'} and go out with the next run of this name."
            )
        if status != "FINISHED":
            tracked.close(status)
        ray.kill(spool)
    return watch


def _run_trainer(run: RunConfig, job: Job) -> None:
    """Ray Train's own records of a try are of no use afterwards (checkpoints are ours), so they are thrown away."""
    import ray
    from ray.train import FailureConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import ScalingConfig  # as ray.train.ScalingConfig is, but to type checkers
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = run.cluster.gpus_per_worker > 0
    resources = {"CPU": run.cluster.cpus_per_worker, **({"GPU": run.cluster.gpus_per_worker} if gpu else {})}
    records = tempfile.mkdtemp(prefix="isthmus-ray-train-")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.put(job)},  # a reference, so that the controller need not import all this
        scaling_config=ScalingConfig(
            num_workers=run.cluster.workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=run.cluster.resize_every_s,
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RayRunConfig(
            name=run.name, storage_path=records, failure_config=FailureConfig(max_failures=run.cluster.max_failures)
        ),
    )
    try:
        with interruptible(), _patience(run.cluster):
            trainer.fit()
    except TrainingFailedError as error:
        fatal = _failure_of(job)
        if fatal is not None:
            raise fatal from None
        raise TrainingError(
            f"The workers of run '{run.name}' failed more often than cluster.max_failures={run.cluster.max_failures}: "
            f"{error}",
            "The same command resumes from the last checkpoint.",
        ) from error
    finally:
        shutil.rmtree(records, ignore_errors=True)


@contextlib.contextmanager
def _patience(cluster: ClusterConfig) -> Iterator[None]:
    """How long Ray Train waits for the workers that it has decided on.

    It decides by a view of the nodes that is up to 20 s old. A range of workers must not wait for a node that is gone,
    but decide again; that counts as no failure of a worker.
    """
    if not cluster.elastic:
        yield
        return
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    before = os.environ.get(name)
    os.environ[name] = "30"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def _failure_of(job: Job) -> IsthmusError | None:
    import ray

    failure: IsthmusError | None = ray.get(job.spool.failure.remote())
    return failure


def _finish(plan: Plan, tracked: Tracked, watch: Watch) -> ModelVersion:
    """Register the exported artefact, note the end, and only then call the run finished."""
    artefact = storage.join(plan.folder, "artefact")
    if watch.references():  # none where this process only registers what an earlier one has trained
        storage.write_bytes(storage.join(plan.folder, REFERENCES), json.dumps(watch.references()).encode())
    with _local_artefact(artefact) as folder:
        lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
        version = ModelVersion(plan.run.name, "", "", artefact, str(folder), lineage)
        try:
            uri, run_id = tracked.run()
            registry.log_params(uri, run_id, {f"reference.{k}": v for k, v in watch.references().items()})
            for name in ("recipe.yaml", "lineage.json", "freezing.json"):
                registry.log_artifacts(uri, run_id, folder / name)
            if plan.run.model is not None:
                name, alias = plan.run.model.name, plan.run.model.alias
                tags = control_tags(plan)
                version = registry.register(folder, name, alias, run_id, uri=uri, lineage=lineage, tags=tags)
        except RegistryError as error:
            raise RegistryError(
                f"The model is trained and lies in {artefact}, but it could not be registered: {error.problem}",
                f"{error.mend} The same command then registers it without training again.",
            ) from error
    tracked.close("FINISHED")
    facts = {"digest": plan.digest, "name": version.name, "version": version.version, "alias": version.alias}
    storage.write_bytes(storage.join(plan.folder, preflight.FINISHED), json.dumps(facts).encode())
    return version


@contextlib.contextmanager
def _local_artefact(url: str) -> Iterator[Path]:
    if storage.is_local(url):
        yield storage.local_path(url).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-artefact-") as temporary:
        folder = Path(temporary) / "artefact"
        for file, _ in storage.list_files(url):
            target = folder / file[len(url) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(file))
        yield folder


def _still_there(plan: Plan, facts: Mapping[str, Any]) -> ModelVersion | None:
    """The model of a finished run, with the alias the recipe names; None when it is gone and must be made again."""
    if plan.run.model is None or facts.get("name") != plan.run.model.name or not facts.get("version"):
        artefact = storage.join(plan.folder, "artefact")
        if plan.run.model is not None or not storage.exists(storage.join(artefact, "model.safetensors")):
            return None
        return ModelVersion(
            plan.run.name, "", "", artefact, artefact if storage.is_local(artefact) else "", plan.lineage
        )
    try:
        name = f"models:/{facts['name']}/{facts['version']}"
        if facts.get("alias") == plan.run.model.alias:
            version = registry.resolve(name, plan.run.tracking)
            changed = {"alias": facts["alias"], "uri": f"models:/{facts['name']}@{facts['alias']}"}
            return ModelVersion(**{**version.__dict__, **changed})
        return registry.promote(name, plan.run.model.alias, plan.run.tracking)
    except RegistryError:
        return None


def _local_folder(plan: Plan) -> Path:
    """Where the driver keeps the spool: the run folder, or for remote storage a folder of that run on this machine."""
    if storage.is_local(plan.folder):
        folder = storage.local_path(plan.folder)
    else:
        cache = Path(os.environ.get("ISTHMUS_CACHE", "~/.cache/isthmus")).expanduser()
        folder = cache / "runs" / hashlib.sha256(plan.folder.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()
