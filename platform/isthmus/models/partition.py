"""Parameters that are spread over ranks (ZeRO 3): each call of a module is then a collective one."""

from __future__ import annotations

from torch import nn


def is_partitioned(module: nn.Module) -> bool:
    """Whether any parameter of the module lies in parts on several ranks.

    Such a module gathers its weights at every call, so all ranks have to call it equally often, whatever their rows.
    """
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter; of the whole one where it lies in parts, since it is empty then."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
