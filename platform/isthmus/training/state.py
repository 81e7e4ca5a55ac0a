"""What training has learnt, by parameter name: the same whatever the ZeRO stage and the number of ranks.

DeepSpeed keeps optimizer state in flat partitions whose borders depend on both, and refuses to read them back under
another. Here each trained parameter and AdamW's two moments of it are whole tensors with their own name, so a run goes
on with another number of workers or another ZeRO stage, and the files are plain safetensors. What a method counts
outside its parameters (:meth:`isthmus.contracts.StageModule.running_state`) is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.contracts import StageModule
from isthmus.errors import StorageError
from isthmus.models.partition import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("parameter", *MOMENTS)
RUNNING = "running"


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name, in the module's order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def state_names(module: nn.Module) -> set[str]:
    """Names of all tensors of a training state: ``exp_avg/qformer.queries`` and so on."""
    return {f"{kind}/{name}" for name in trained(module) for kind in KINDS} | set(_running(module))


def _running(module: nn.Module) -> dict[str, Tensor]:
    state = module.running_state() if isinstance(module, StageModule) else {}
    return {f"{RUNNING}/{name}": value for name, value in state.items()}


def gather_state(engine: Any, *, stage: int, rank: int, world: int) -> dict[str, Tensor]:
    """This rank's share of the training state, float32 on the CPU; collective. Shares are disjoint and cover all.
    A method's running state is rank 0's, in whatever type it is.

    Call it after at least one optimizer step: before, there are no moments.
    """
    _link_moments(engine, stage)
    mine = {name: value.clone() for name, value in _running(engine.module).items()} if rank == 0 else {}
    for number, (name, parameter) in enumerate(trained(engine.module).items()):
        for kind in KINDS:
            whole = _whole(engine, parameter, kind, stage)
            if number % world == rank:
                mine[f"{kind}/{name}"] = (
                    whole.detach().to("cpu", torch.float32, copy=True).reshape(whole_shape(parameter))
                )
    return mine


def load_parameters(module: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Writes the stored parameters, and a method's running state, into a module that no engine has taken yet.

    Args:
        read: tensor of a training state by name.
    """
    with torch.no_grad():
        for name, parameter in trained(module).items():
            parameter.copy_(_fitting(read(f"parameter/{name}"), parameter, name))
    if isinstance(module, StageModule):
        module.load_running_state({name: read(f"{RUNNING}/{name}") for name in module.running_state()})


def load_moments(engine: Any, read: Callable[[str], Tensor], *, stage: int, steps: int) -> None:
    """Gives a fresh engine AdamW's moments and the number of steps done.

    Args:
        read: tensor of a training state by name.
        steps: optimizer steps done.
    """
    for state, flat, fused in _flat_states(engine, stage):
        where = flat.device if fused else torch.device("cpu")
        state[flat] = {
            "step": torch.tensor(float(steps), device=where),
            **{kind: torch.zeros_like(flat) for kind in MOMENTS},
        }
    _link_moments(engine, stage)
    for name, parameter in trained(engine.module).items():
        for kind in MOMENTS:
            _set(engine, parameter, kind, _fitting(read(f"{kind}/{name}"), parameter, name), stage)


def check_names(found: Mapping[str, Any] | set[str], module: nn.Module, url: str) -> None:
    """Raises StorageError unless a stored state holds exactly what the module trains."""
    wanted, there = state_names(module), set(found)
    if wanted != there:
        missing, surplus = sorted(wanted - there), sorted(there - wanted)
        raise StorageError(
            f"The checkpoint {url} does not fit this model: it lacks {len(missing)} tensors ({missing[:3]}) and has "
            f"{len(surplus)} that are not known ({surplus[:3]}).",
            "Name a new run, or delete that folder.",
        )


def _fitting(value: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    if tuple(value.shape) != whole_shape(parameter):
        raise StorageError(
            f"The checkpoint's '{name}' has shape {tuple(value.shape)}, the model's {whole_shape(parameter)}.",
            "Name a new run.",
        )
    return value


def _link_moments(engine: Any, stage: int) -> None:
    """Lets ZeRO 1 and 2 find the moments by parameter. DeepSpeed does it once, after the first parameter group's first
    step, when the other groups have none yet."""
    if stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _whole(engine: Any, parameter: nn.Parameter, kind: str, stage: int) -> Tensor:
    if stage == 0:
        return parameter if kind == "parameter" else engine.optimizer.state[parameter][kind]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: Tensor = (
        safe_get_full_fp32_param(parameter) if kind == "parameter" else safe_get_full_optimizer_state(parameter, kind)
    )
    return found


def _set(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor, stage: int) -> None:
    if stage == 0:
        engine.optimizer.state[parameter][kind].copy_(value)
        return
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    value = value.to(parameter.device)
    if stage < 3:
        safe_set_full_optimizer_state(parameter, value, kind)
        return
    # The call for whole tensors cannot fill the last rank's part where the ranks do not divide the elements.
    part = safe_get_local_optimizer_state(parameter, kind).numel()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, part * world - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[rank * part : (rank + 1) * part], kind)


def _flat_states(engine: Any, stage: int) -> Iterator[tuple[Any, Tensor, bool]]:
    """(state dictionary, the tensor that it is keyed by, whether the optimizer is fused) of all that AdamW steps on."""
    if stage == 0:
        for group in engine.optimizer.param_groups:
            for parameter in group["params"]:
                yield engine.optimizer.state, parameter, bool(group.get("fused"))
        return
    inner = engine.optimizer.optimizer
    flats = (
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )
    for flat in flats:
        yield inner.state, flat, bool(inner.defaults.get("fused"))
