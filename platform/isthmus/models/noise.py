"""Dropout that does not depend on which process a row is in.

torch draws dropout masks from a generator of the process, so the same run on another number of workers draws others.
Here the mask of a row is a function of a key, and the key of (seed, step, pass, place in the global batch). A key picks
a window of one fixed random table, which is a copy of bytes: on a CPU a third of the time of torch's own dropout.

Windows may overlap, as any two draws of finitely many may coincide; with 2^22 places to begin at, two masks of a pass
begin at the same one about as often as two people share a birthday in a town of four million days.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.contracts import Comm

_TABLE, _WIDEST = 1 << 22, 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def row_keys(seed: int, step: int, purpose: int, rows_B: Tensor) -> Tensor:
    """Keys of a pass, int64 [B].

    Args:
        seed, step: of the run.
        purpose: which pass of the step.
        rows_B: int64, places in the global batch.
    """
    key = torch.zeros_like(rows_B)
    for word in (seed, step, purpose):
        key = subkeys(key, word)
    return subkeys(key, rows_B)


def batch_keys(seed: int, step: int, purpose: int, batch: int, comm: Comm, device: torch.device) -> Tensor:
    """:func:`row_keys` of this rank's rows of the global batch, of which every rank has ``batch``."""
    return row_keys(seed, step, purpose, comm.rank * batch + torch.arange(batch, device=device))


def subkeys(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Keys that differ by ``numbers``; both are broadcast. SplitMix64 (Steele, Lea and Flood, 2014) on int64, which
    wraps around as unsigned integers do."""
    steps = _wrapped(numbers * _GOLDEN) if isinstance(numbers, int) else numbers * _GOLDEN
    x = keys + steps + _GOLDEN
    x = (x ^ _right(x, 30)) * _FIRST
    x = (x ^ _right(x, 27)) * _SECOND
    return x ^ _right(x, 31)


def _wrapped(number: int) -> int:
    """The int64 that a Python integer overflows to."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class KeyedDropout(nn.Module):
    """Dropout of the last dimension by keys of the others; without keys it is torch's.

    Attributes:
        p: share of the values that become zero in training.
        site: number of this place in the model; see :func:`number_sites`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.site = p, 0

    @property
    def awake(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.p > 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """``x`` [..., W] with int64 ``keys`` [...]."""
        if not self.awake:
            return x
        if keys is None:
            return nn.functional.dropout(x, self.p)
        kept = _windows(self.p, x.shape[-1], x.device)[_places(subkeys(keys, self.site))]
        return torch.where(kept, x * (1 / (1 - self.p)), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def number_sites(*modules: nn.Module) -> None:
    """Gives every :class:`KeyedDropout` below ``modules`` a number of its own."""
    found: Sequence[KeyedDropout] = [part for m in modules for part in m.modules() if isinstance(part, KeyedDropout)]
    for number, part in enumerate(found):
        part.site = number


def _places(keys: Tensor) -> Tensor:
    """Where the windows begin. The width does not enter: attention weights of padded texts are wider on some ranks."""
    return _right(keys, 1) % (_TABLE - _WIDEST)


def _windows(p: float, width: int, device: torch.device) -> Tensor:
    """All windows of the table, bool [places, W], without copying it."""
    assert width <= _WIDEST, f"a row of {width} values is wider than the table's margin"
    return _table(p, device).unfold(0, width, 1)


@functools.lru_cache(maxsize=8)
def _table(p: float, device: torch.device) -> Tensor:
    """True with probability 1 - p, the same everywhere."""
    generator = torch.Generator().manual_seed(0x1577)
    return (torch.rand(_TABLE, generator=generator) >= p).to(device)
