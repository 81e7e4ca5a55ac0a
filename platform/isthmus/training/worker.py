"""The one training loop, for every method: what each Ray Train worker runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from isthmus import storage
from isthmus.config import RunConfig
from isthmus.contracts import Base, Batch, BuildContext, LossTerms, Stage
from isthmus.data.mixture import order_of, passes
from isthmus.data.parallel import store_environment
from isthmus.data.quarantine import check_cut
from isthmus.data.streamed import Encoding, encoder_base
from isthmus.errors import ConfigError, IsthmusError, StorageError, nearest
from isthmus.methods.artefact import check_bases, read_bases
from isthmus.models.freezing import freeze, verdict_table
from isthmus.models.partition import whole_shape
from isthmus.registry.manifest import run_identity
from isthmus.training import checkpoint
from isthmus.training.comm import TorchComm
from isthmus.training.optimizer import learning_rate
from isthmus.training.state import check_names, load_moments, load_parameters
from isthmus.training.zero import (
    build_engine,
    gather_owned,
    resolve_precision,
    run_forward,
    set_learning_rate,
    trained_norm,
)

_MOST_UNWRITTEN = 3
"""Checkpoints in a row that could not be written and that a run bears."""

_PEER = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out|store|cuda error", re.IGNORECASE)
"""What torch, gloo and NCCL write into the plain RuntimeError by which one hears of a dead peer or a lost device."""


class TrainingError(IsthmusError):
    """Training that cannot go on: a loss that is no number, memory that does not suffice, a fault in a method."""


@dataclass(frozen=True)
class Job:
    """All that a worker is told.

    Attributes:
        run: the resolved recipe.
        spec: the method's entry of METHODS. It travels with the job, so a method that the driver registered in its own
            script is known here too.
        samples: rows of the manifest, of all manifests of a mixture.
        parent: local folder of the model that the run starts from, or None.
        lineage: data, parent and code, for the artefact.
        spool: handle of the :class:`isthmus.training.metrics.Spool` actor.
        cached: the frozen encoder behind a feature cache, which the workers' stage does not know.
        mixed: rows of each of the manifests of a mixture.
    """

    run: RunConfig
    spec: Any
    samples: int
    parent: str | None
    lineage: Mapping[str, Any]
    spool: Any
    cached: tuple[Base, ...] = ()
    mixed: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each data set."""
        return self.mixed or (self.samples,)

    @property
    def folder(self) -> str:
        return storage.join(self.run.storage, self.run.name)

    @property
    def checkpoints(self) -> str:
        return storage.join(self.folder, "checkpoints")


def train_worker(config: Mapping[str, Any]) -> None:
    """Entry point under Ray Train; ``config["job"]`` refers to a :class:`Job`.

    A fault that a restart would meet again is left with the spool before it is raised, and the restarted group then
    returns at once, so the driver reports that fault instead of the restarts.
    """
    import ray
    import ray.train.torch

    job: Job = ray.get(config["job"])
    if ray.get(job.spool.failure.remote()) is not None:
        return
    try:
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            _use_cores(ray.train.get_context().get_local_world_size())
        Worker(job, device, _ActorOut(job.spool)).train()
    except Exception as error:
        fatal = _as_fatal(error)
        if fatal is None:
            raise
        ray.get(job.spool.fail.remote(fatal, ray.train.get_context().get_world_rank()))
        if not _all_failed(job):
            raise fatal from error


def _all_failed(job: Job, patience_s: float = 5.0) -> bool:
    """Whether every rank met such a fault, as with a loss that is no number. Then all return and nothing is restarted;
    a rank that waits for this one in a collective call has to be ended by the error instead."""
    import ray

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if ray.get(job.spool.failed_ranks.remote()) >= job.run.cluster.workers:
            return True
        time.sleep(0.1)
    return False


def _as_fatal(error: Exception) -> IsthmusError | None:
    if isinstance(error, IsthmusError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingError(
            f"A worker ran out of device memory: {str(error).splitlines()[0]}", "Lower train.global_batch."
        )
    if _is_transient(error):
        return None
    trace = "".join(traceback.format_exception(error))
    return TrainingError(f"A worker failed with {type(error).__name__}: {error}\n{trace}")


def _is_transient(error: Exception) -> bool:
    """Whether it may be a dead or unreachable peer, so that a restart of the group may mend it. Anything else is a
    fault that the restart would meet again."""
    if isinstance(error, (OSError, TimeoutError, torch.distributed.DistError)):
        return True
    return isinstance(error, RuntimeError) and _PEER.search(str(error)) is not None


@dataclass
class _Window:
    """Sums over the steps since the last logged row."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    images: int = 0
    tokens: int = 0
    waited_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step's values; a loss part that is not computed in every step is averaged over those it is in."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class Out(Protocol):
    """Where a worker's rows and events go; see :class:`isthmus.training.metrics.Spool`."""

    def append(self, row: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...


class _ActorOut:
    """A spool in another process; nothing waits for it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def append(self, row: Mapping[str, Any]) -> None:
        self.actor.append.remote(row)

    def event(self, event: Mapping[str, Any]) -> None:
        self.actor.event.remote(event)


class Worker:
    """One rank of a run. Needs an initialised process group, and no Ray.

    Args:
        job: what to train.
        device: where.
        out: takes rank 0's rows and every rank's events.
    """

    def __init__(self, job: Job, device: torch.device, out: Out) -> None:
        self.job, self.run, self.train_config = job, job.run, job.run.train
        self.device, self.out, self.comm = device, out, TorchComm()
        self.failed = self.cut = self.seen = self.retried = 0
        self.first = self.comm.rank == 0
        self.encoder: Base | None = None
        self.pending: checkpoint.Pending | None = None
        self.all_written = True
        self.unwritten = 0
        self.watched: list[float] = []
        self._note("start", pid=os.getpid(), rank=self.comm.rank, host=socket.gethostname())

    def train(self) -> None:
        """Build, resume, step until ``train.steps``, export."""
        # Rank 0 decides: nodes with different processors must not train in different precisions.
        here = resolve_precision(self.train_config.precision, cuda=self.device.type == "cuda")
        self.precision = self.comm.broadcast(here)
        self.stage = self._build()
        if self.first:
            self._note("verdict", table=verdict_table(self.stage.module))
            known = self.stage.references(self.train_config.global_batch)
            self._note("references", references={f"loss_{k}": asdict(v) for k, v in known.items()})
        start = self._start()
        self.window = _Window()
        for step, (batch, waited_s) in enumerate(self._batches(start), start=start):
            if step == start:
                self._note("stepping", step=start) if self.first else None
            self._step(step, batch, waited_s)
            done = step + 1
            if done % self.train_config.checkpoint_every == 0 or done == self.train_config.steps:
                self._checkpoint(done)
        self._export()

    def _build(self) -> Stage:
        seed = self.train_config.seed
        torch.manual_seed(seed)
        context = BuildContext(
            comm=self.comm,
            seed=seed,
            with_vision=self.run.data.placement == "inline",
            parent=self.job.parent,
            bf16=self.precision == "bf16",
            gradient_checkpointing=self.train_config.gradient_checkpointing,
            micro_batch=self.train_config.micro_batch,
        )
        stage: Stage = self.job.spec.build(self.run.method, context)
        freeze(stage.module, self.train_config.frozen)
        stage.module.train()
        # What still draws from the process's generator, as a frozen language model's dropout, differs between ranks.
        torch.manual_seed(seed * 1_000_003 + self.comm.rank)
        return stage

    def _start(self) -> int:
        """Build the engine, from the newest whole checkpoint where there is one. Returns the steps done."""
        found, self.attempt = None, 1
        if self.first:
            found, skipped = checkpoint.newest(self.job.checkpoints, self._identity())
            self.attempt = checkpoint.last_attempt(self.job.checkpoints) + 1
            for reason in skipped:
                self._note("skipped", reason=reason)
        found, self.attempt = self.comm.broadcast((found, self.attempt))
        if found is None:
            self.engine = build_engine(self.stage.module, self.run, self.device, self.precision)
            return 0
        with checkpoint.Restored(found, self.comm.rank) as restored:
            check_names(restored.names(), self.stage.module, found.url)
            load_parameters(self.stage.module, restored.read)
            self.engine = build_engine(self.stage.module, self.run, self.device, self.precision)
            load_moments(self.engine, restored.read, stage=self.run.zero.stage, steps=found.step)
            restored.set_random_state()
        if self.first:
            self._note("resumed", step=found.step, url=found.url)
        return int(found.step)

    def _batches(self, start: int) -> Iterator[tuple[Batch, float]]:
        """This rank's batches and the seconds that each was waited for."""
        if start >= self.train_config.steps:
            return
        from isthmus.data.stream import train_batches

        config, data = self.train_config, self.run.data
        order = order_of(data, self.job.sizes, config.global_batch, config.seed)
        batches = iter(
            train_batches(
                data, self.stage, order, self.comm.rank, self.comm.world_size, start, config.steps, config.seed,
                self._on_failure, self._encoding(), self._on_encoder, self._on_retries,
            )
        )  # fmt: skip
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch.to(self.device), time.perf_counter() - began

    def _encoding(self) -> Encoding | None:
        if self.run.data.placement != "streamed":
            return None
        cluster = self.run.cluster
        return Encoding(
            self.run.method.vision,  # type: ignore[attr-defined]  # every method that is streamed has one
            self.precision == "bf16",
            cluster.encoders,
            cluster.cpus_per_encoder,
            cluster.gpus_per_encoder,
            cluster.encoder_resources,
            store_environment(),
        )

    def _on_retries(self, count: int) -> None:
        self.retried += count

    def _on_encoder(self, digest: str) -> None:
        """The encoder of a streamed run has said who it is; a parent's must be the same."""
        self.encoder = encoder_base(self.run.method.vision, digest)  # type: ignore[attr-defined]
        if self.job.parent is not None:
            check_bases(read_bases(self.job.parent), [self.encoder])

    def _on_failure(self, failure: Any) -> None:
        """Count an unreadable sample and name it to the driver; the stream's budget stops when there are too many."""
        self.failed += 1
        facts = {name: getattr(failure, name, None) for name in ("id", "key", "shard", "offset", "reason")}
        self._note("unreadable", **facts)

    def _step(self, step: int, batch: Batch, waited_s: float) -> None:
        rate = learning_rate(step, self.train_config)
        set_learning_rate(self.engine, rate)
        terms = run_forward(self.engine, batch)
        values = self._reduced(terms)
        if not math.isfinite(values["loss"]):
            self._stop_not_finite(step, batch, values)
        self.engine.backward(terms.total)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        values["grad_norm"] = float(norm) if norm is not None else 0.0
        if not math.isfinite(values["grad_norm"]):
            self._stop_not_finite(step, batch, values)
        self._count(batch, waited_s)
        self.window.add(values)
        self._watch(step, values)
        if self.pending is not None and self.all_written:
            self._settle()
        done = step + 1
        if done % self.train_config.log_every == 0 or done == self.train_config.steps or step == 0:
            self._log(done, batch.epoch, rate)

    def _reduced(self, terms: LossTerms) -> dict[str, float]:
        """The loss, its parts and the metrics as global values: one small all-reduce. It also tells whether every rank
        has written its share of the checkpoint under way."""
        named = {"loss": terms.total, **{f"loss_{k}": v for k, v in terms.parts.items()}, **terms.metrics}
        written = torch.tensor(float(self.pending is None or self.pending.done), device=self.device)
        stacked = torch.stack([value.detach().float().reshape(()) for value in (*named.values(), written)])
        *mean, share = (self.comm.sum(stacked) / self.comm.world_size).tolist()
        self.all_written = share == 1.0
        return dict(zip(named, mean, strict=True))

    def _stop_not_finite(self, step: int, batch: Batch, values: Mapping[str, float]) -> None:
        """Raises on every rank alike. Parameter norms show whether the fault is in the model or in the batch."""
        ids = self.comm.collect(batch.sample_ids_B[batch.valid_B].tolist())
        norm = trained_norm(self.stage.module, stage=self.run.zero.stage)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise TrainingError(
            f"The loss is no finite number at step {step} ({shown}; parameter norm {norm:.4g}; "
            f"sample ids by worker: {ids}).",
            "Lower train.lr, lengthen train.warmup_steps, or look at those samples; the last checkpoint is kept.",
        )

    def _count(self, batch: Batch, waited_s: float) -> None:
        window = self.window
        window.steps += 1
        window.images += int(batch.valid_B.sum())
        window.tokens += int(batch.mask_BT.sum()) if batch.mask_BT is not None else 0
        window.waited_s += waited_s
        self.seen += int(batch.valid_B.sum())
        if batch.cut_B is not None:
            self.cut += int((batch.cut_B & batch.valid_B).sum())

    def _log(self, done: int, epoch: int, rate: float) -> None:
        window, self.window = self.window, _Window()
        sums = [window.images, window.tokens, window.waited_s, self.failed, self.cut, self.seen, self.retried]
        counts = torch.tensor(sums, dtype=torch.float64, device=self.device)
        images, tokens, waited, failed, cut, seen, retried = self.comm.sum(counts).tolist()
        check_cut(int(cut), int(seen), self.job.samples, self.run.data.max_cut_share, self.run.data.where)
        if not self.first:
            return
        seconds = max(time.perf_counter() - window.started, 1e-9)
        values = window.means() | {
            "lr": rate,
            "epoch": epoch,
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait_share": waited / self.comm.world_size / seconds,
            "unreadable": failed,
            "reads_retried": retried,
            "captions_cut": cut / max(seen, 1),
            **passes(self.run.data, self.job.sizes, done * self.train_config.global_batch),
        }
        self.out.append({"step": done, "time": time.time(), "metrics": values})

    def _identity(self) -> dict[str, str]:
        """What every checkpoint of this run is a state of."""
        bases = {f"{base.role} weights": base.digest for base in self.stage.bases}
        return run_identity(self.run, self.job.lineage) | bases

    def _watch(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the value that decides which checkpoint is the best."""
        name = self.train_config.keep_best
        if name is None:
            return
        if name in values:
            self.watched.append(values[name])
        elif step == 0:  # later steps may leave a loss out
            raise ConfigError(
                f"train.keep_best is '{name}', which this method does not log.{nearest(name, values)}",
                f"It logs: {', '.join(values)}.",
            )

    def _checkpoint(self, done: int) -> None:
        if self.pending is not None:
            self._settle()
        self.pending = checkpoint.begin(
            self.engine, self.job.checkpoints, done,
            attempt=self.attempt, zero_stage=self.run.zero.stage, comm=self.comm, run=self._identity(),
            score=sum(self.watched) / len(self.watched) if self.watched else None,
        )  # fmt: skip
        self.watched.clear()
        if done == self.train_config.steps:
            self._settle()

    def _settle(self) -> None:
        """Close the checkpoint under way. One that cannot be written costs the run nothing but that checkpoint, unless
        it is the last one or the third in a row."""
        pending, self.pending = self.pending, None
        assert pending is not None
        try:
            checkpoint.settle(pending, self.comm)
        except StorageError as error:
            self.unwritten += 1
            if pending.step == self.train_config.steps or self.unwritten >= _MOST_UNWRITTEN:
                raise
            if self.first:
                self._note("unwritten", step=pending.step, reason=str(error))
            return
        self.unwritten = 0
        if self.first:
            with contextlib.suppress(StorageError):  # tried again behind the next one
                checkpoint.prune(
                    self.job.checkpoints,
                    self.train_config.keep_checkpoints,
                    keep_best=self.train_config.keep_best is not None,
                )
            self._note("checkpoint", step=pending.step)

    def _export(self) -> None:
        """Rank 0 writes the artefact folder; ZeRO 3 gathers its parameters on the way."""
        state = gather_owned(self.stage.module, stage=self.run.zero.stage, keep=self.first)
        if self.first:
            from isthmus.methods.artefact import save_artefact
            from isthmus.registry.manifest import with_bases

            target = storage.join(self.job.folder, "artefact")
            with _artefact_folder(target) as folder:
                known = {base.role for base in self.stage.bases}
                bases = (*self.stage.bases, *(base for base in self._elsewhere() if base.role not in known))
                facts = with_bases(self.job.lineage, bases)
                save_artefact(folder, state, self.run, self.stage, facts, bases=bases)
            self._note(
                "exported", url=target,
                precision=self.precision,
                trainable=sum(_numel(p) for p in self.stage.module.parameters() if p.requires_grad),
                frozen=sum(_numel(p) for p in self.stage.module.parameters() if not p.requires_grad),
                bases=facts["bases"],
            )  # fmt: skip
        self.comm.barrier()

    def _elsewhere(self) -> tuple[Base, ...]:
        """The frozen encoder where it ran outside the workers."""
        if self.run.data.placement != "streamed":
            return self.job.cached
        return (self.encoder or encoder_base(self.run.method.vision),)  # type: ignore[attr-defined]

    def _note(self, kind: str, **facts: Any) -> None:
        self.out.event({"kind": kind, **facts})


def _numel(parameter: torch.nn.Parameter) -> int:
    return math.prod(whole_shape(parameter))


def _use_cores(workers_here: int) -> None:
    """Ray allows a worker of one CPU a single thread; on CPUs the workers share out the cores that are there."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))


class _artefact_folder:  # noqa: N801 - used as a function
    """A folder to write into; at the end it replaces ``url`` (a rename locally, an upload elsewhere)."""

    def __init__(self, url: str) -> None:
        self.url = url
        parent = storage.local_path(url).parent if storage.is_local(url) else None
        self._temporary = tempfile.TemporaryDirectory(prefix=".artefact-", dir=parent)

    def __enter__(self) -> Path:
        folder = Path(self._temporary.name) / "artefact"
        folder.mkdir()
        return folder

    def __exit__(self, kind: Any, *_: Any) -> None:
        folder = Path(self._temporary.name) / "artefact"
        try:
            if kind is None:
                storage.delete(self.url)
                if storage.is_local(self.url):
                    folder.replace(storage.local_path(self.url))
                else:
                    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                        checkpoint.put_file(file, storage.join(self.url, *file.relative_to(folder).parts))
        finally:
            self._temporary.cleanup()
