"""Parameters that stay within bounds: put back behind AdamW's step, before its result reaches the model.

Cutting the gradient at a bound would not do. The gradient that a rank sees is its own share, whose direction says
nothing of the sum's; and AdamW's momentum steps on without one. What is put back is this rank's part of the values that
AdamW steps on, element by element, so nothing is sent and every ZeRO stage does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isthmus.contracts import StageModule
from isthmus.training.state import trained


def hold_bounds(engine: Any, optimizer: torch.optim.Optimizer, *, stage: int) -> None:
    """Have ``optimizer``, the one inside ``engine``, hold the module's bounded parameters from now on.

    Raises:
        KeyError: the module bounds a parameter that it does not have.
    """
    module = engine.module
    if not isinstance(module, StageModule) or not (bounds := module.bounds()):
        return
    everything, learns = dict(module.named_parameters()), trained(module)
    if unknown := bounds.keys() - everything.keys():
        raise KeyError(f"bounds of parameters that are not there: {sorted(unknown)}")
    bounded = [(learns[name], *bounds[name]) for name in bounds if name in learns]

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for parameter, low, high in bounded:
            _clamp(parameter, low, high, stage)

    optimizer.register_step_post_hook(put_back)


def _clamp(parameter: nn.Parameter, low: float, high: float, stage: int) -> None:
    if stage == 0:
        parameter.clamp_(low, high)
    elif stage == 3:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))
    elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
        mapping.hp_fragment.clamp_(low, high)
