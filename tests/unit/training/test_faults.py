"""What a worker does with a fault: restart, or say it once."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import ConfigError
from isthmus.training.faults import TrainingError, as_fatal


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        torch.distributed.DistNetworkError("the server socket has failed to listen"),
        ConnectionResetError("reset"),
        TimeoutError("no answer"),
    ],
)
def test_a_lost_peer_is_worth_a_restart(error: Exception) -> None:
    assert as_fatal(error) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x16 and 32x8)"),
        RuntimeError("self.stride(-1) must be 1 to view Float as Byte (different element sizes), but got 3"),
        NotImplementedError("no kernel"),
        KeyError("ids"),
    ],
)
def test_a_fault_that_a_restart_would_meet_again_is_said_at_once(error: Exception) -> None:
    fatal = as_fatal(error)
    assert isinstance(fatal, TrainingError)
    assert type(error).__name__ in str(fatal)


def test_what_is_for_the_user_stays_as_it_is_and_memory_names_the_mend() -> None:
    plain = ConfigError("The key is wrong.", "Mend it.")
    assert as_fatal(plain) is plain
    short = as_fatal(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert short is not None and "train.global_batch" in short.mend
