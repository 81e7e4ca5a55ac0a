"""Small modules, what torch counts of their steps, and the sizes that a plan would be given. For the planning tests."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.config import LanguageConfig, QFormerConfig, TokenDropConfig, VisionConfig
from isthmus.contracts import Batch, Comm, LocalComm
from isthmus.losses.matching import Negatives
from isthmus.methods.blip2_stage1 import Blip2Stage1
from isthmus.methods.blip2_stage1_config import Blip2Stage1Config
from isthmus.methods.blip2_stage2 import Blip2Stage2, Blip2Stage2Config
from isthmus.models.compression import tokens_left
from isthmus.models.language import build_language
from isthmus.planning.shapes import Local
from isthmus.testing.backbones import tiny_lm, tiny_t5

VOCAB = 120
FAMILIES = ("opt", "llama", "gpt2", "t5")


class TwoAlike(LocalComm):
    """Two ranks with the same rows, played by one."""

    world_size = 2

    def gather(self, x_B: Tensor, *, grad: bool) -> Tensor:
        both = torch.cat([x_B, x_B])
        return both if grad else both.detach()

    def fetch_rows(self, x_B: Tensor, index: Tensor) -> Tensor:
        return x_B[index % len(x_B)]


def qformer(
    queries: int, layers: int = 3, cross_every: int = 2, dropout: float = 0.0,
    compression: TokenDropConfig | None = None,
) -> QFormerConfig:  # fmt: skip
    """A Q-Former in BERT's proportions."""
    return QFormerConfig(
        layers=layers, width=64, heads=4, feed_forward=256, queries=queries, cross_every=cross_every, dropout=dropout,
        embed=16, init=None, compression=compression,
    )  # fmt: skip


@dataclass
class Case:
    """A module with one batch, and its sizes as a plan has them."""

    module: nn.Module
    config: Any
    batch: Batch
    local: Local

    def loss(self, *, bf16: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            total: Tensor = self.module(self.batch).total
        return total


def stage1(
    config: QFormerConfig, *, images: int = 6, tokens: int = 19, width: int = 48, longest: int = 9, step: int = 0,
    comm: Comm | None = None, recompute: bool = False, micro_batch: int | None = None, **options: Any,
) -> Case:  # fmt: skip
    """Stage 1 on random features and texts of different lengths. Negatives are the neighbours, so that the tokens of
    the matching pass are known."""
    torch.manual_seed(0)
    comm = comm or LocalComm()
    method = Blip2Stage1Config(qformer=config, **options)
    module = Blip2Stage1(method, None, width, None, comm, 0, vocab=VOCAB, recompute=recompute).train()
    module.micro_batch = micro_batch
    turn = torch.arange(images)
    module.mine = lambda *_, **__: Negatives(turn.roll(1), turn.roll(-1), turn >= 0)  # type: ignore[assignment]
    lengths = torch.randint(3, longest, (images,))
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    batch = Batch(
        turn, turn >= 0, step=step, features_BND=torch.randn(images, tokens, width),
        ids_BT=torch.randint(1, VOCAB, (images, longest)) * mask, mask_BT=mask,
    )  # fmt: skip
    rows = float(lengths.sum())
    read = tokens_left(tokens, config.compression)
    return Case(module, method, batch, Local(images, comm.world_size, read, width, rows, longest, rows - images))


def language_config(family: str, folder: Path) -> LanguageConfig:
    """A tiny language model of the family."""
    return tiny_t5(folder / family) if family == "t5" else tiny_lm(folder / family, family)  # type: ignore[arg-type]


def stage2(
    family: str, folder: Path, config: QFormerConfig, *, bf16: bool = False, images: int = 8, recompute: bool = False
) -> Case:
    """Stage 2 through a tiny language model."""
    torch.manual_seed(0)
    tokens, width = 19, 48
    language = build_language(language_config(family, folder), bf16=bf16, recompute=recompute)
    method = Blip2Stage2Config(vision=VisionConfig(), qformer=config, language=language.config)
    module = Blip2Stage2(method, None, width, language, LocalComm(), recompute=recompute).train()
    texts = ["a red cat on the grass with a house", "blue fish"] * (images // 2)
    prefixes = ["a photo of the", "a photo"] * (images // 2) if language.splits else None
    turn = torch.arange(images)
    batch = Batch(turn, turn >= 0, features_BND=torch.randn(images, tokens, width))
    batch = replace(batch, **language.token_members(texts, prefixes))
    assert batch.ids_BT is not None and batch.labels_BT is not None
    labels = float((batch.labels_BT != -100).sum())
    return Case(module, method, batch, Local(images, 1, tokens, width, labels, batch.ids_BT.shape[1], labels))


def counted_flops(case: Case) -> tuple[float, float]:
    """Operations of forward and backward as torch counts them, attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total = case.loss()
        forward = counter.get_total_flops()
        total.backward()
    return float(forward), float(counter.get_total_flops() - forward)


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(run: Callable[[], Tensor], not_counted: Iterable[Tensor]) -> float:
    """Bytes that autograd still holds for the backward pass when ``run`` is done, each storage once.

    What a graph inside kept and let go again is not among them: it is found by what is still alive.
    """
    apart = {tensor.untyped_storage()._cdata for tensor in not_counted}
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        total = run()
    storages = {held.tensor.untyped_storage()._cdata: held.tensor.untyped_storage().nbytes() for held in alive}
    del total
    return float(sum(size for key, size in storages.items() if key not in apart))


def kept_of(case: Case, *, bf16: bool = False) -> float:
    """Of a case, without its parameters and the batch."""
    case.loss(bf16=bf16)  # what the first call makes and keeps
    assert case.batch.features_BND is not None
    return kept_bytes(lambda: case.loss(bf16=bf16), [*case.module.parameters(), case.batch.features_BND])
