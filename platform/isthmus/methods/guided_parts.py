"""What the guided methods share: texts of one length on all ranks, draws of guidance, keys of the passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.config import CompressionConfig
from isthmus.contracts import Batch, Comm
from isthmus.losses.counting import uniform
from isthmus.models.noise import row_keys

PAIRS = ("own", "other image", "other text")
PASSES = ("image", "text", "masked", "masked fusion", *PAIRS)
"""Passes of a step; dropout draws differ between them."""

GUIDANCE_DRAW = 21  # sets the draw of guided pairs apart from those of negatives, captions and masks


def common_length(batch: Batch, comm: Comm) -> Batch:
    """The batch with its texts padded to the longest of all ranks, so that tokens can be gathered."""
    assert batch.ids_BT is not None and batch.mask_BT is not None
    more = comm.max(batch.ids_BT.shape[1]) - batch.ids_BT.shape[1]
    if not more:
        return batch
    return replace(batch, ids_BT=F.pad(batch.ids_BT, (0, more)), mask_BT=F.pad(batch.mask_BT, (0, more)))


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
