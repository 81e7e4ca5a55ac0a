"""Several processes on one machine, joined by gloo: what tests of distributed code run in.

    results = run_ranks(function, 2, argument)        # [function's value on rank 0, on rank 1]

``function`` is importable by name (a module's own function), because each process starts afresh: forked from a helper
process that has imported torch and done nothing else, so only the first call of a session waits for the import.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time; the message holds every rank's traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes with a gloo process group; the results in rank order.

    Each process has one torch thread, so that W ranks and one rank add up in the same order. Tensors may be arguments
    and results.

    Raises:
        RankError: any rank failed. The others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with tempfile.TemporaryDirectory(prefix="isthmus-gloo-") as folder:
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, timeout_s, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout_s)
        for process in processes:
            process.join(max(0.0, (deadline - datetime.datetime.now()).total_seconds()))
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
        return _collect(Path(folder), [process.exitcode for process in processes])


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout_s: float, args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        answer: dict[str, Any] = {"value": function(*args)}
        dist.barrier()
    except Exception:
        answer = {"error": traceback.format_exc()}
    torch.save(answer, Path(folder) / f"rank{rank}.pt")
    if "error" in answer:
        os._exit(1)  # no orderly leave: the other ranks may be waiting in a collective call
    dist.destroy_process_group()


def _collect(folder: Path, codes: Sequence[int | None]) -> list[Any]:
    answers, faults = [], []
    for rank, code in enumerate(codes):
        file = folder / f"rank{rank}.pt"
        if not file.is_file():
            faults.append(f"rank {rank} gave no answer (exit code {code})")
            continue
        answer = torch.load(file, weights_only=False)
        if "error" in answer:
            faults.append(f"rank {rank}:\n{answer['error']}")
        answers.append(answer.get("value"))
    if faults:
        raise RankError("\n".join(faults))
    return answers
