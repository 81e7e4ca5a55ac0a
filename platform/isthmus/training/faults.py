"""Which faults of a worker end a run, and which a restart of the group may mend."""

from __future__ import annotations

import re
import traceback

import torch

from isthmus.errors import IsthmusError

_PEER = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out|store|cuda error", re.IGNORECASE)
"""What torch, gloo and NCCL write into the plain RuntimeError by which one hears of a dead peer or a lost device."""


class TrainingError(IsthmusError):
    """Training that cannot go on: a loss that is no number, memory that does not suffice, a fault in a method."""


def as_fatal(error: Exception) -> IsthmusError | None:
    """The error to end the run with, or None where a restart may mend it."""
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
