"""The one training loop, for every method: what each Ray Train worker runs."""

from __future__ import annotations

import gc
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from isthmus.contracts import Base, Batch, BuildContext, LossTerms, Stage
from isthmus.data.mixture import order_of, passes
from isthmus.data.parallel import store_environment
from isthmus.data.quarantine import check_cut
from isthmus.data.streamed import Encoding, encoder_base
from isthmus.methods.artefact import check_bases, read_bases, start_from
from isthmus.models.freezing import freeze, verdict_table
from isthmus.registry.manifest import run_identity
from isthmus.training import checkpoint
from isthmus.training.comm import TorchComm
from isthmus.training.export import write_artefact
from isthmus.training.faults import TrainingError as TrainingError
from isthmus.training.faults import as_fatal
from isthmus.training.gradients import part_norms, plain_norm
from isthmus.training.job import ActorOut, Out
from isthmus.training.job import Job as Job
from isthmus.training.optimizer import learning_rate
from isthmus.training.samples import contact_sheet
from isthmus.training.saving import Saving
from isthmus.training.state import check_names, load_moments, load_parameters
from isthmus.training.telemetry import Telemetry
from isthmus.training.window import Window
from isthmus.training.zero import (
    build_engine,
    gather_owned,
    resolve_precision,
    run_forward,
    set_learning_rate,
    trained_norm,
)


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
    os.environ.update(job.environment)
    try:
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            _use_cores(ray.train.get_context().get_local_world_size())
        Worker(job, device, ActorOut(job.spool)).train()
    except Exception as error:
        fatal = as_fatal(error)
        if fatal is None:
            raise
        ray.get(job.spool.fail.remote(fatal, ray.train.get_context().get_world_rank()))
        if not _all_failed(job, ray.train.get_context().get_world_size()):
            raise fatal from error


def _all_failed(job: Job, world: int, patience_s: float = 5.0) -> bool:
    """Whether every rank met such a fault, as with a loss that is no number. Then all return and nothing is restarted;
    a rank that waits for this one in a collective call has to be ended by the error instead."""
    import ray

    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if ray.get(job.spool.failed_ranks.remote()) >= world:
            return True
        time.sleep(0.1)
    return False


def train_here(job: Job) -> None:
    """The same in this process, as the only rank. The process group stays for the next run: DeepSpeed keeps hold of it.

    Raises:
        IsthmusError: a fault that another try would meet again, as under Ray Train. Others are raised as they are.
    """
    gpu = job.run.cluster.gpus_per_worker > 0
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=0, world_size=1)
    threads, rank_known = torch.get_num_threads(), "LOCAL_RANK" in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    try:
        if not gpu:
            _use_cores(1)
        Worker(job, device, ActorOut(job.spool)).train()
    except Exception as error:
        if (fatal := as_fatal(error)) is not None:
            raise fatal from error
        raise
    finally:
        torch.set_num_threads(threads)
        if not rank_known:
            del os.environ["LOCAL_RANK"]
        gc.collect()  # engine and module hold each other, and this process goes on


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
        self.all_written = True
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
        self.telemetry = Telemetry(self.comm, self.device)
        self.window = Window()
        batch: Batch | None = None
        for step, (batch, waited_s) in enumerate(self._batches(start), start=start):
            if step == start:
                self._note("stepping", step=start) if self.first else None
            self._step(step, batch, waited_s)
            done = step + 1
            if done % self.train_config.checkpoint_every == 0 or done == self.train_config.steps:
                self.saving.begin(done)
        self._export()
        if self.first and batch is not None and self.train_config.sample_sheet:
            self._show_samples(batch)

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
        if self.job.parent is not None and not self.job.spec.starts:
            start_from(stage, self.job.parent)
        freeze(stage.module, self.train_config.frozen)
        stage.module.train()
        # What still draws from the process's generator, as a frozen language model's dropout, differs between ranks.
        torch.manual_seed(seed * 1_000_003 + self.comm.rank)
        return stage

    def _start(self) -> int:
        """Build the engine, from the newest whole checkpoint where there is one. Returns the steps done."""
        found, attempt, identity = None, 1, self._identity()
        if self.first:
            found, skipped = checkpoint.newest(self.job.checkpoints, identity)
            attempt = checkpoint.last_attempt(self.job.checkpoints) + 1
            for reason in skipped:
                self._note("skipped", reason=reason)
        found, attempt = self.comm.broadcast((found, attempt))
        if found is None:
            self.engine = build_engine(self.stage.module, self.run, self.device, self.precision)
        else:
            self._restore(found)
        self.saving = Saving(self.job, self.engine, self.comm, attempt, identity, self._note)
        return int(found.step) if found is not None else 0

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        with checkpoint.Restored(found, self.comm.rank) as restored:
            check_names(restored.names(), self.stage.module, found.url)
            load_parameters(self.stage.module, restored.read)
            self.engine = build_engine(self.stage.module, self.run, self.device, self.precision)
            load_moments(self.engine, restored.read, stage=self.run.zero.stage, steps=found.step)
            restored.set_random_state()
        if self.first:
            self._note("resumed", step=found.step, url=found.url)

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
            self.job.vision,
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
        self.encoder = encoder_base(self.job.vision, digest)
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
        done = step + 1
        logged = done % self.train_config.log_every == 0 or done == self.train_config.steps or step == 0
        norms = part_norms(self.engine, stage=self.run.zero.stage, comm=self.comm) if logged else {}
        plain = plain_norm(self.engine) if self.run.zero.stage == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if plain is None else plain
        values["grad_norm"] = float(norm) if norm is not None else 0.0
        if not math.isfinite(values["grad_norm"]):
            self._stop_not_finite(step, batch, values)
        self._count(batch, waited_s)
        clip = self.train_config.clip_norm
        self.window.add(values | {"clipped_share": float(0 < clip < values["grad_norm"])})
        self.saving.watch(step, values)
        if self.saving.pending is not None and self.all_written:
            self.saving.settle()
        if logged:
            self._log(done, batch.epoch, rate, norms)

    def _reduced(self, terms: LossTerms) -> dict[str, float]:
        """The loss, its parts and the metrics as global values: one small all-reduce. It also tells whether every rank
        has written its share of the checkpoint under way."""
        named = {"loss": terms.total, **{f"loss_{k}": v for k, v in terms.parts.items()}, **terms.metrics}
        written = torch.tensor(float(self.saving.written), device=self.device)
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
        self.window.count(batch, waited_s)
        self.seen += int(batch.valid_B.sum())
        if batch.cut_B is not None:
            self.cut += int((batch.cut_B & batch.valid_B).sum())

    def _log(self, done: int, epoch: int, rate: float, norms: Mapping[str, float]) -> None:
        window, self.window = self.window, Window()
        sums = [window.images, window.tokens, window.waited_s, self.failed, self.cut, self.seen, self.retried]
        counts = torch.tensor(sums, dtype=torch.float64, device=self.device)
        images, tokens, waited, failed, cut, seen, retried = self.comm.sum(counts).tolist()
        check_cut(int(cut), int(seen), self.job.samples, self.run.data.max_cut_share, self.run.data.where)
        machines = self.telemetry.read()
        if not self.first:
            return
        seconds = window.seconds()
        values = window.means() | {
            "lr": rate,
            "epoch": epoch,
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_per_step": tokens / window.steps,
            "step_s": seconds / window.steps,
            "samples_seen": float(done * self.train_config.global_batch),
            "data_wait_share": waited / self.comm.world_size / seconds,
            "unreadable": failed,
            "reads_retried": retried,
            "captions_cut": cut / max(seen, 1),
            **passes(self.run.data, self.job.sizes, done * self.train_config.global_batch),
        }
        values |= {f"lr/{prefix}": rate * scale for prefix, scale in self.train_config.lr_scale.items()}
        values |= {f"grad_norm/{part}": norm for part, norm in norms.items()}
        self.out.append({"step": done, "time": time.time(), "metrics": values | machines})

    def _identity(self) -> dict[str, str]:
        """What every checkpoint of this run is a state of."""
        bases = {f"{base.role} weights": base.digest for base in (*self.stage.bases, *self.job.cached)}
        return run_identity(self.run, self.job.lineage) | bases

    def _export(self) -> None:
        """Rank 0 writes the artefact folder; ZeRO 3 gathers its parameters on the way."""
        state = gather_owned(self.stage.module, stage=self.run.zero.stage, keep=self.first)
        if self.first:
            facts = write_artefact(self.job, self.stage, state, self._elsewhere())
            self._note("exported", precision=self.precision, **facts)
        self.comm.barrier()

    def _show_samples(self, batch: Batch) -> None:
        """Rank 0's sheet of samples. The run is done and its model written: whatever goes wrong here is only noted."""
        try:
            sheet = contact_sheet(
                self.stage, batch, self.train_config.sample_sheet,
                data=self.run.data.train,
                autocast=self.device.type if self.precision == "bf16" else None,
                whole=self.run.zero.stage < 3,
            )  # fmt: skip
            for end, data in sheet.items():
                self.out.artefact(f"samples/step-{self.train_config.steps:08d}.{end}", data)
        except Exception as error:
            self._note("unsampled", reason=f"{type(error).__name__}: {error}")

    def _elsewhere(self) -> tuple[Base, ...]:
        """The frozen encoder where it ran outside the workers."""
        if self.run.data.placement != "streamed":
            return self.job.cached
        return (self.encoder or encoder_base(self.job.vision),)

    def _note(self, kind: str, **facts: Any) -> None:
        self.out.event({"kind": kind, **facts})


def _use_cores(workers_here: int) -> None:
    """Ray allows a worker of one CPU a single thread; on CPUs the workers share out the cores that are there."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
