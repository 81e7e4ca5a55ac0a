"""Trainable parameters of the paper's models, counted on the meta device (Li et al. 2023, tables 1 to 3)."""

from __future__ import annotations

import pytest
import torch

from isthmus.config import QFormerConfig
from isthmus.contracts import LocalComm
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config

EVA_G, CLIP_L = 1408, 1024
SHAPE = QFormerConfig(init=None)


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class Words(torch.nn.Module):
    """A language model's width and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


@pytest.mark.parametrize(("image_width", "count"), [(EVA_G, 186_705_470), (CLIP_L, 183_165_758)])
def test_stage_1(image_width: int, count: int) -> None:
    with torch.device("meta"):
        module = Blip2Stage1(Blip2Stage1Config(qformer=SHAPE), None, image_width, None, LocalComm(), 0, vocab=30522)
    assert trainable(module) == count


@pytest.mark.parametrize(
    ("image_width", "language_width", "count"),
    [
        (EVA_G, 2560, 107_133_696),  # OPT-2.7B
        (EVA_G, 4096, 108_314_880),  # OPT-6.7B, FLAN-T5-XXL
        (EVA_G, 2048, 106_739_968),  # FLAN-T5-XL
        (CLIP_L, 2560, 103_593_984),
        (CLIP_L, 4096, 104_775_168),
        (CLIP_L, 2048, 103_200_256),
    ],
)
def test_stage_2(image_width: int, language_width: int, count: int) -> None:
    config = Blip2Stage2Config(qformer=SHAPE)
    with torch.device("meta"):
        module = Blip2Stage2(config, None, image_width, Words(language_width), LocalComm())
    assert trainable(module) == count
