"""The process's random-number state as tensors, to be stored and brought back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, torch.Tensor]:
    """The process's random-number state as tensors."""
    numbers: Any = np.random.get_state()
    assert numbers[0] == "MT19937"
    _, keys, position, has_gauss, gauss = numbers
    version, words, held = random.getstate()
    assert version == 3
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(keys.astype(np.int64)),
        "numpy.place": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if held is None else [held], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """What :func:`random_state` gave, in force again."""
    torch.set_rng_state(state["torch"])
    devices = [state[name] for name in sorted((n for n in state if n.startswith("cuda.")), key=lambda n: int(n[5:]))]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    position, has_gauss = state["numpy.place"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy.gauss"][0])))
    held = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), held[0] if held else None))
