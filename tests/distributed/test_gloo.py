"""The launcher of small process groups itself."""

from __future__ import annotations

import pytest
import torch

from isthmus.testing.gloo import RankError, run_ranks


def fail_on_rank_one() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("no luck on rank one")
    dist.barrier()


def add_ranks(offset: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank())]) + offset
    dist.all_reduce(total)
    return total


def test_results_come_back_in_rank_order() -> None:
    assert [float(value) for value in run_ranks(add_ranks, 2, torch.ones(1), timeout_s=200)] == [3.0, 3.0]


def test_a_failing_rank_is_reported_and_the_others_are_ended() -> None:
    with pytest.raises(RankError, match="no luck on rank one"):
        run_ranks(fail_on_rank_one, 2, timeout_s=200)
