"""What ZeRO's offloading moves into the host's memory, and the time that its way there and back takes."""

from __future__ import annotations

from collections.abc import Mapping

from isthmus.planning.activations import FP32, Keeping
from isthmus.planning.subject import Subject

HOST_BANDWIDTH = 200e9
"""Bytes/s of a node's memory, which its workers share; assumed."""
HOST_LINK = 25e9
"""Bytes/s between the host and one accelerator, each way: PCIe 4 of 16 lanes at four fifths of its rate; assumed."""
ADAMW_BYTES = 7 * FP32
"""For each parameter the fused step reads it, its gradient and two moments, and writes all but the gradient."""

_OPTIMIZER = ("their master copy", "AdamW's moments")
_PARAMETERS = ("image encoder, frozen", "language model, frozen", "trained parameters")


def optimizer_offloaded(subject: Subject, stage: int, keeping: Keeping) -> bool:
    """Whether the optimizer is on the host under ``stage``. On processors there is no other place."""
    return keeping.cuda and stage > 0 and subject.run.zero.offload_optimizer == "cpu"


def parameters_offloaded(subject: Subject, stage: int, keeping: Keeping) -> bool:
    """Whether shares of parameters are on the host under ``stage``."""
    return keeping.cuda and stage == 3 and subject.run.zero.offload_parameters == "cpu"


def moved(subject: Subject, stage: int, workers: int, keeping: Keeping, parts: Mapping[str, float]) -> dict[str, float]:
    """Bytes of one worker in the host's memory by part.

    From ZeRO 2 on a worker's share of the gradients lies there as well, and under ZeRO 3, whose steps work on the
    parameters themselves where nothing is offloaded, a master copy.

    Args:
        parts: bytes by part on the device if nothing were offloaded.
    """
    found: dict[str, float] = {}
    if optimizer_offloaded(subject, stage, keeping):
        found |= {name: parts[name] for name in _OPTIMIZER}
        if stage > 1:
            found["gradients"] = parts["gradients"]
        if stage == 3:
            found["their master copy"] = float(FP32 * subject.trained) / workers
    if parameters_offloaded(subject, stage, keeping):
        found |= {name: parts[name] for name in _PARAMETERS}
    return found


def host_seconds(subject: Subject, stage: int, workers: int, neighbours: int, keeping: Keeping) -> float:
    """AdamW on the host, gradients copied there and parameters back.

    Args:
        neighbours: workers of one node, which share its memory's bandwidth.
    """
    if not optimizer_offloaded(subject, stage, keeping):
        return 0.0
    mine = subject.trained / workers
    return ADAMW_BYTES * mine / (HOST_BANDWIDTH / neighbours) + 2 * FP32 * mine / HOST_LINK


def fetching_seconds(subject: Subject, stage: int, keeping: Keeping, parts: Mapping[str, float]) -> float:
    """A worker's own shares of the parameters on their way to the accelerator: the image encoder's once a step, the
    others' in the forward and the backward pass. Counted as if nothing of it were hidden."""
    if not parameters_offloaded(subject, stage, keeping):
        return 0.0
    once, twice = parts["image encoder, frozen"], parts["language model, frozen"] + parts["trained parameters"]
    return (once + 2 * twice) / HOST_LINK
