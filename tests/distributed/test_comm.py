"""TorchComm on two gloo processes against what one process computes from all the rows."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from isthmus.contracts import Comm
from isthmus.training.comm import TorchComm

INDEX = ([5, 0, 3, 3], [1, 1, 4, 2])  # asks for own and foreign rows, one row several times over


def rows(rank: int) -> torch.Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def weights(rank: int, n: int) -> torch.Tensor:
    return torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(90 + rank), dtype=torch.float64)


def work(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    comm: Comm = TorchComm()
    result: dict[str, object] = {"rank": comm.rank, "world": comm.world_size}

    x = rows(rank).requires_grad_()
    full = comm.gather(x, grad=True)
    (full * weights(rank, 6)).sum().backward()
    result["gather"], result["gather_grad"] = full.detach(), x.grad
    constant = comm.gather(x, grad=False)
    result["detached"] = not constant.requires_grad and torch.equal(constant, full)
    result["bool"] = comm.gather(torch.tensor([rank == 0, True, False]), grad=False)

    y = rows(rank).requires_grad_()
    picked = comm.fetch_rows(y, torch.tensor(INDEX[rank]))
    (picked * weights(rank, 4)).sum().backward()
    result["fetch"], result["fetch_grad"] = picked.detach(), y.grad
    result["fetch_ids"] = comm.fetch_rows(torch.arange(3) + 10 * rank, torch.tensor(INDEX[rank]))
    try:
        comm.fetch_rows(y, torch.tensor([6, 0, 0, 0]))
    except IndexError as error:
        result["refused"] = str(error)

    result["sum"] = comm.sum(torch.tensor([1.0 + rank]))
    result["max"] = comm.max(3 - rank)
    result["broadcast"] = TorchComm().broadcast(f"from {rank}")
    result["collect"] = TorchComm().collect(rank * 2)
    torch.save(result, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("comm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port, str(out)), nprocs=2)
    return [torch.load(Path(out) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_gather_concatenates_in_rank_order_and_sums_gradients(ranks: list[dict]) -> None:
    everything = torch.cat([rows(0), rows(1)])
    expected_grad = weights(0, 6) + weights(1, 6)
    for rank, got in enumerate(ranks):
        assert (got["rank"], got["world"]) == (rank, 2)
        assert torch.equal(got["gather"], everything)
        torch.testing.assert_close(got["gather_grad"], expected_grad[3 * rank : 3 * rank + 3], rtol=0, atol=1e-14)
        assert got["detached"]
        assert got["bool"].tolist() == [True, True, False, False, True, False]


def test_fetch_rows_equals_gather_then_index_forward_and_gradient(ranks: list[dict]) -> None:
    everything = torch.cat([rows(0), rows(1)]).requires_grad_()
    loss = sum((everything[torch.tensor(INDEX[r])] * weights(r, 4)).sum() for r in range(2))
    loss.backward()
    for rank, got in enumerate(ranks):
        assert torch.equal(got["fetch"], everything.detach()[torch.tensor(INDEX[rank])])
        expected = everything.grad[3 * rank : 3 * rank + 3]
        torch.testing.assert_close(got["fetch_grad"], expected, rtol=0, atol=1e-14)
        ids = torch.cat([torch.arange(3), torch.arange(3) + 10])
        assert torch.equal(got["fetch_ids"], ids[torch.tensor(INDEX[rank])])
        assert "0..5" in got["refused"]


def test_reductions_and_control_data(ranks: list[dict]) -> None:
    for got in ranks:
        assert got["sum"].tolist() == [3.0]
        assert got["max"] == 3
        assert got["broadcast"] == "from 0"
        assert got["collect"] == [0, 2]
