"""What the guided methods share: draws of guidance, keys of the passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isthmus.config import CompressionConfig
from isthmus.contracts import Batch, Comm
from isthmus.losses.counting import uniform
from isthmus.methods.parts import PAIRS
from isthmus.models.noise import row_keys

PASSES = ("image", "text", "masked", "masked fusion", *PAIRS)
"""Passes of a step; dropout draws differ between them."""

GUIDANCE_DRAW = 21  # sets the draw of guided pairs apart from those of negatives, captions and masks


def draw_guided(config: CompressionConfig, valid_B: Tensor, seed: int, step: int, comm: Comm) -> Tensor:
    """Which of each row's pairs are guided, bool [B, 3]; a function of (seed, step, global row, pass)."""
    rows = comm.rank * len(valid_B) + np.arange(len(valid_B))
    u = uniform(seed, step, rows[:, None], np.arange(len(PAIRS)), GUIDANCE_DRAW)
    return (torch.from_numpy(u) >= config.guidance_dropout).to(valid_B.device)


def pass_keys(
    name: str, batch: Batch, seed: int, comm: Comm, device: torch.device, rows_B: Tensor | None = None
) -> Tensor:
    """Dropout's keys of a pass, int64 [B]: of this rank's rows, or of the global rows ``rows_B``."""
    if rows_B is None:
        rows_B = comm.rank * len(batch) + torch.arange(len(batch), device=device)
    return row_keys(seed, batch.step, PASSES.index(name), rows_B)
