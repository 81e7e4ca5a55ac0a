"""Collectives over ``torch.distributed`` in the form that losses ask for (see :class:`isthmus.contracts.Comm`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch renamed these; the old names warn where the new ones exist.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchComm:
    """The process group of this training run.

    Args:
        group: process group; the default group when None. It must be initialised before the first collective call.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __repr__(self) -> str:
        return f"TorchComm(rank={self.rank}, world_size={self.world_size})"

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, x_B: Tensor, *, grad: bool) -> Tensor:
        """Rows of every rank in rank order, [world_size * B, ...]; see :meth:`isthmus.contracts.Comm.gather`."""
        if not grad:
            return _gather_rows(x_B.detach(), self.group)
        result: Tensor = _Gather.apply(x_B, self.group)
        return result

    def fetch_rows(self, x_B: Tensor, index: Tensor) -> Tensor:
        """Rows ``index`` ([K] int64, global numbers) of the gathered x, differentiable.

        One all-to-all moves the K rows that were asked for, instead of world_size * B rows to everyone; its backward
        sends each row's gradient home, where the gradients of rows that several ranks asked for are summed.

        Raises:
            IndexError: an index is outside 0 .. world_size * B - 1.
        """
        index = index.to(x_B.device, torch.int64)
        rows = x_B.shape[0]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows * self.world_size):
            raise IndexError(f"row numbers must lie in 0..{rows * self.world_size - 1}, got {index.tolist()}")
        plan = _Plan(index, rows, self.group)
        result: Tensor = _Fetch.apply(x_B, plan)
        return result

    def sum(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, value: int) -> int:
        largest = torch.tensor([value], dtype=torch.int64, device=self._device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank. Any picklable object; for control data, not for tensors."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value`` in rank order, on every rank."""
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.group)
        return box

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def _device(self) -> torch.device:
        cuda = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    _all_gather(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the ranks' gradients of each row and keeps this rank's slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return _gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        mine = grad.new_empty((ctx.rows, *grad.shape[1:]))
        _reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine, None


class _Plan:
    """Who sends which rows to whom, worked out once from the ranks' row numbers.

    Attributes:
        send: this rank's local row numbers, in the order in which the other ranks want them.
        send_counts, receive_counts: rows to and from each rank.
        order: positions of the received rows in the caller's order.
    """

    def __init__(self, index: Tensor, rows: int, group: dist.ProcessGroup | None) -> None:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        wanted = _gather_rows(index, group).view(world, -1)
        owner, local = wanted // rows, wanted % rows
        self.group = group
        self.send = torch.cat([local[peer][owner[peer] == rank] for peer in range(world)])
        self.send_counts = [int((owner[peer] == rank).sum()) for peer in range(world)]
        self.receive_counts = [int((owner[rank] == peer).sum()) for peer in range(world)]
        self.order = torch.cat([(owner[rank] == peer).nonzero().flatten() for peer in range(world)])


def _exchange(x: Tensor, incoming: list[int], outgoing: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty((sum(incoming), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), incoming, outgoing, group=group)
    return out


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan) -> Tensor:
        ctx.plan, ctx.rows = plan, x.shape[0]
        received = _exchange(x[plan.send], plan.receive_counts, plan.send_counts, plan.group)
        out = torch.empty_like(received)
        out[plan.order] = received
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        plan: _Plan = ctx.plan
        returned = _exchange(grad[plan.order], plan.send_counts, plan.receive_counts, plan.group)
        mine = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        mine.index_add_(0, plan.send, returned)
        return mine, None
