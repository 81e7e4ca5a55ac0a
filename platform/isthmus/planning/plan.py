"""A training run reckoned beforehand: what fits where, how long a step takes, what the run costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.errors import ConfigError
from isthmus.planning import memory as sizes
from isthmus.planning.activations import Keeping
from isthmus.planning.assumptions import GRADIENT_PASSES, KEPT_PASSES, Assumption, assumptions, sample_bytes
from isthmus.planning.communication import exposed_seconds, traffic
from isthmus.planning.hardware import CPU, Gpu
from isthmus.planning.offload import ADAMW_BYTES, fetching_seconds, host_seconds, moved, optimizer_offloaded
from isthmus.planning.subject import Subject


@dataclass(frozen=True)
class Wishes:
    """What the user says beside the recipe.

    Attributes:
        gpu: the accelerator. nodes, gpus_per_node: how many.
        utilisation: share of the peak rate that matrix products reach over a step.
        network_efficiency: share of a link's rate that collectives reach.
        samples, epochs: size of the data set and passes over it; steps follow from them.
        steps: instead of those; the recipe's own by default.
        price: of one accelerator for an hour, in any currency.
        bytes_per_sample: read from storage for each sample.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    utilisation: float
    network_efficiency: float = 0.8
    samples: float | None = None
    epochs: float | None = None
    steps: int | None = None
    price: float | None = None
    bytes_per_sample: float | None = None

    @property
    def workers(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Stage:
    """One ZeRO stage: bytes by part, their sum, and what would fit at most.

    Attributes:
        memory: on the device. host: bytes that offloading puts into the host's memory for a worker, by part.
        largest_global_batch: 0 where not even one image a worker fits.
        communication_bytes: that a worker sends in a step. step_seconds: with that communication.
    """

    memory: dict[str, float]
    host: dict[str, float]
    total: float
    fits: bool
    largest_global_batch: int
    communication_bytes: float
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """All figures. Sizes are bytes, times seconds unless the name says otherwise, operations those of one worker."""

    run: dict[str, Any]
    parameters: dict[str, int]
    stages: dict[int, Stage]
    flops: dict[str, dict[str, float]]
    step: dict[str, float]
    data: dict[str, float]
    whole: dict[str, float | None]
    assumptions: tuple[Assumption, ...]

    @property
    def chosen(self) -> Stage:
        """The stage that the recipe asks for."""
        return self.stages[int(self.run["zero_stage"])]

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def check_batch(global_batch: int, nodes: int, gpus_per_node: int) -> int:
    """Images of one worker.

    Raises:
        ConfigError: the workers do not divide the batch; names the batches beside it that they do.
    """
    workers = nodes * gpus_per_node
    if global_batch % workers:
        below = global_batch // workers * workers
        near = " or ".join(f"train.global_batch={size}" for size in (below, below + workers) if size)
        raise ConfigError(
            f"train.global_batch {global_batch} does not divide among {workers} workers "
            f"({nodes} nodes of {gpus_per_node}).",
            f"Give {near}.",
        )
    return global_batch // workers


def resolve_precision(asked: str, gpu: Gpu) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 on every accelerator of the table. What a processor of the run has is not
    known here, so there it is fp32."""
    return asked if asked != "auto" else "fp32" if gpu.name == CPU else "bf16"


def reckon(subject: Subject, wishes: Wishes) -> Plan:
    """The plan of a recipe on a cluster.

    Raises:
        ConfigError: the workers do not divide the batch.
    """
    run, gpu, workers = subject.run, wishes.gpu, wishes.workers
    images = check_batch(run.train.global_batch, wishes.nodes, wishes.gpus_per_node)
    precision = resolve_precision(run.train.precision, gpu)
    keeping = Keeping(bf16=precision == "bf16", cuda=gpu.name != CPU)
    flops = subject.flops(images, workers)
    rate = gpu.rate(precision) * wishes.utilisation
    timed = {name: seconds for name, seconds in gpu.timed.items() if name in flops}
    products = [part for name, part in flops.items() if name not in timed]
    backward = sum(part.backward for part in products) / rate
    backward += sum(seconds * flops[name].backward / flops[name].total for name, seconds in timed.items())
    compute = sum(part.total for part in products) / rate
    elements = _elementwise_seconds(subject, wishes, keeping, images)
    elements += gpu.start * sum(sum(part.products.values()) for part in products)
    busy = compute + elements + sum(timed.values())
    stages = {stage: _stage(subject, wishes, keeping, stage, images, busy, backward) for stage in sizes.STAGES}
    step_seconds = stages[run.zero.stage].step_seconds
    optimizer = _optimizer_seconds(subject, wishes, keeping, run.zero.stage)
    total = sum(part.total for part in flops.values())
    step = {
        "seconds": step_seconds,
        "matrix products": compute,
        **({"work on elements": elements} if elements else {}),
        **{f"{name}, timed": seconds for name, seconds in timed.items()},
        "AdamW": optimizer,
        "communication not hidden": step_seconds - busy - optimizer,
        "model-FLOPs utilisation": total / step_seconds / gpu.rate(precision),
        "images per second": run.train.global_batch / step_seconds,
        **_tokens(subject, run.train.global_batch),
    }
    data, whole = _whole(subject, wishes, step_seconds)
    return Plan(
        run={
            "name": run.name, "method": run.method.name, "zero_stage": run.zero.stage, "precision": precision,
            "gpu": gpu.name, "gpu_memory": gpu.memory, "nodes": wishes.nodes, "gpus_per_node": wishes.gpus_per_node,
            "workers": workers, "global_batch": run.train.global_batch, "images_per_worker": images,
        },
        parameters=_parameters(subject),
        stages=stages,
        flops={name: {"forward": part.forward, "backward": part.backward} for name, part in flops.items()},
        step=step,
        data=data,
        whole=whole,
        assumptions=assumptions(subject, wishes, precision),
    )  # fmt: skip


def _elementwise_seconds(subject: Subject, wishes: Wishes, keeping: Keeping, images: int) -> float:
    """Norms, activations, sums, and gradients of the parameters, on a processor; all of them move bytes."""
    if not wishes.gpu.elementwise:
        return 0.0
    parts = subject.ever_kept(images, wishes.workers, keeping)
    kept = sum(size for name, size in parts.items() if name not in wishes.gpu.timed)
    again = 1.5 if subject.plain is not subject else 1.0  # half of the passes are the forward pass's
    # Each part of a batch makes gradients of all weights, which are added up.
    gradients = GRADIENT_PASSES * 4.0 * subject.trained * subject.parts(images)
    moved = again * KEPT_PASSES * kept + gradients
    return moved / wishes.gpu.elementwise


def _stage(
    subject: Subject, wishes: Wishes, keeping: Keeping, stage: int, images: int, compute: float, backward: float
) -> Stage:
    gpu, workers = wishes.gpu, wishes.workers
    room = gpu.memory if keeping.cuda else gpu.memory / wishes.gpus_per_node  # workers of one machine share its memory
    whole = sizes.whole_memory(subject, stage, images, workers, keeping)
    parts, host = sizes.memory(subject, stage, images, workers, keeping), moved(subject, stage, workers, keeping, whole)
    total = sum(parts.values())
    sent = traffic(subject, stage, images, workers, keeping)
    bandwidth = (gpu.link if wishes.nodes == 1 else min(gpu.link, gpu.network)) * wishes.network_efficiency
    seen = exposed_seconds(sent, bandwidth, backward=backward, overlap=keeping.cuda, stage=stage)
    seen += fetching_seconds(subject, stage, keeping, whole)
    seconds = compute + _optimizer_seconds(subject, wishes, keeping, stage) + seen
    largest = sizes.largest_images(subject, stage, workers, keeping, room)
    return Stage(parts, host, total, total <= room, largest * workers, sent.total, seconds)


def _optimizer_seconds(subject: Subject, wishes: Wishes, keeping: Keeping, stage: int) -> float:
    if optimizer_offloaded(subject, stage, keeping):
        return host_seconds(subject, stage, wishes.workers, wishes.gpus_per_node, keeping)
    mine = subject.trained / (wishes.workers if stage else 1)
    return ADAMW_BYTES * mine / wishes.gpu.bandwidth


def _parameters(subject: Subject) -> dict[str, int]:
    found = {
        "image encoder, frozen": subject.vision.parameters,
        "language model, frozen": subject.language.parameters if subject.language is not None else 0,
        "held by train.frozen": subject.held,
        "trained": subject.trained,
    }
    return {name: count for name, count in found.items() if count}


def _tokens(subject: Subject, global_batch: int) -> dict[str, float]:
    """Tokens of a step over all workers."""
    found = {
        "image tokens": float(global_batch * subject.vision.tokens),
        "query tokens": float(global_batch * subject.qformer.queries),
        "caption tokens": global_batch * subject.texts.mean,
    }
    if subject.read_tokens != subject.vision.tokens:
        found["image tokens that the Q-Former reads"] = float(global_batch * subject.read_tokens)
    if subject.language is not None:
        rows = subject.language_rows()
        found["places of the language model"] = float(global_batch * (rows.read + rows.predicted))
    return found


def _whole(subject: Subject, wishes: Wishes, step_seconds: float) -> tuple[dict[str, float], dict[str, float | None]]:
    """Reading and the whole run."""
    batch = subject.run.train.global_batch
    size = wishes.bytes_per_sample or sample_bytes(subject)
    steps = wishes.steps or subject.run.train.steps
    if wishes.steps is None and wishes.samples is not None and wishes.epochs is not None:
        steps = math.ceil(wishes.samples * wishes.epochs / batch)
    seconds = steps * step_seconds
    hours = seconds / 3600 * wishes.workers
    data = {
        "bytes per sample": size,
        "bytes per step": size * batch,
        "bytes per second": size * batch / step_seconds,
        "bytes per run": size * batch * steps,
    }
    whole = {
        "steps": float(steps),
        "samples seen": float(steps * batch),
        "epochs": steps * batch / wishes.samples if wishes.samples else None,
        "seconds": seconds,
        "accelerator hours": hours,
        "cost": hours * wishes.price if wishes.price is not None else None,
    }
    return data, whole
