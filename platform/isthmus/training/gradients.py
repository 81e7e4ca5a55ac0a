"""Gradient norms by part of the model, exact whatever the ZeRO stage.

Every stage leaves each element of the averaged gradient with at least one rank between the backward pass and the
optimizer's step: stage 0 with all of them, stages 1 and 2 with the rank whose flat partition it falls into, stage 3
with the rank that holds that part of the parameter. So each rank squares and sums what it has, and one all-reduce of a
number per part does the rest. DeepSpeed's ``safe_get_full_grad`` would instead put every gradient together on every
rank, one collective call a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.contracts import Comm
from isthmus.training.state import trained

_DEPTH = 2
FROZEN = "frozen"


def part_of(name: str) -> str:
    """The part of the model that a parameter's norm is logged under: the first two names on the way to it, without
    list indices and the lists' own names.

    ``qformer.layers.3.cross.query.weight`` and its like in every layer are ``qformer.cross``, ``ln_vision.bias`` is
    ``ln_vision``, ``qformer.queries`` and ``temperature`` are themselves.
    """
    words = name.split(".")
    if len(words) > 1 and words[-1] in ("weight", "bias"):
        words.pop()
    last = max(number for number, word in enumerate(words) if not word.isdigit())
    lists = {number - 1 for number, word in enumerate(words) if word.isdigit()} - {last}
    kept = [word for number, word in enumerate(words) if not word.isdigit() and number not in lists]
    return ".".join(kept[:_DEPTH])


def part_norms(engine: Any, *, stage: int, comm: Comm) -> dict[str, float]:
    """Euclidean norm of the averaged gradient by :func:`part_of`, before clipping; collective.

    The root of the sum of their squares is the global norm that the engine clips by. Parameters that are not trained
    count as ``frozen``, which is 0 unless something is wrong. Call it behind ``engine.backward`` and before
    ``engine.step``.
    """
    names = trained(engine.module)
    parts = list(dict.fromkeys(part_of(name) for name in names))
    place = {part: number for number, part in enumerate([*parts, FROZEN])}
    squares = _local_squares(engine, names, stage)
    frozen = {n: p.grad for n, p in engine.module.named_parameters() if not p.requires_grad and p.grad is not None}
    squares |= _squares(frozen)
    device = next(iter(names.values())).device
    sums = torch.zeros(len(place), dtype=torch.float64, device=device)
    if squares:
        index = torch.tensor([place[part_of(n) if n in names else FROZEN] for n in squares], device=device)
        sums.index_add_(0, index, torch.stack([value.to(device) for value in squares.values()]))
    whole = comm.sum(sums) / (comm.world_size if stage == 0 else 1)
    return dict(zip(place, whole.sqrt().tolist(), strict=True))


def plain_norm(engine: Any) -> float:
    """Euclidean norm of the averaged gradient under stage 0, where every rank has all of it and DeepSpeed reports none.
    Call it where :func:`part_norms` is called."""
    squares = _squares({name: p.grad for name, p in trained(engine.module).items() if p.grad is not None})
    return float(torch.stack(list(squares.values())).sum().sqrt()) if squares else 0.0


def _local_squares(engine: Any, names: Mapping[str, nn.Parameter], stage: int) -> dict[str, Tensor]:
    """Sum of squares of this rank's elements of each gradient, float64 scalars; a parameter none of whose elements are
    here is left out."""
    optimizer = engine.optimizer
    if stage == 0:
        return _squares({name: p.grad for name, p in names.items() if p.grad is not None})
    if hasattr(optimizer, "norm_for_param_grads"):
        # An offloaded optimizer's gradients are on their way to the host; DeepSpeed has taken each one's norm before.
        norms = optimizer.norm_for_param_grads
        found = {name: norms.get(optimizer.get_param_id(parameter)) for name, parameter in names.items()}
        return {name: norm.double().square() for name, norm in found.items() if norm is not None}
    if stage == 3:
        from deepspeed.utils import safe_get_local_grad

        return _squares({name: safe_get_local_grad(parameter) for name, parameter in names.items()})
    mapped = {name: p for name, p in names.items() if p._hp_mapping is not None}  # type: ignore[attr-defined]
    return _squares({name: _fragment(parameter) for name, parameter in mapped.items()})


def _fragment(parameter: Any) -> Tensor:
    """The elements of a gradient that fall into this rank's flat partition, under ZeRO 1 and 2."""
    mapping = parameter._hp_mapping
    found: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    return found.narrow(0, address.start, address.numel) if found.numel() == parameter.numel() else found


def _squares(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not gradients:
        return {}
    norms = torch._foreach_norm([gradient.detach().float() for gradient in gradients.values()])
    return {name: norm.double().square() for name, norm in zip(gradients, norms, strict=True)}
