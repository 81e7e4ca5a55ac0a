"""Formulas of operations against what torch counts of the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.config import TokenDropConfig
from isthmus.contracts import LocalComm
from isthmus.planning import compute
from isthmus.planning.compute import Flops
from isthmus.planning.frozen import measure_language
from planning_cases import FAMILIES, VOCAB, TwoAlike, counted_flops, qformer, stage1, stage2

SMALL = 0.005  # the norm's shift through key and value weights, and the key bias of direct cross-attention


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("queries", "tokens", "layers", "cross_every", "options"),
    [
        (4, 19, 3, 2, {}),
        (16, 7, 2, 1, {"itc_gather": "full"}),
        (2, 60, 3, 2, {"weights": {"itm": 0.0}}),  # few queries of many tokens: read without projecting
        (4, 19, 2, 2, {"weights": {"itg": 0.0}}),
    ],
)
def test_stage1(
    queries: int, tokens: int, layers: int, cross_every: int, options: dict[str, Any], workers: int
) -> None:
    config = qformer(queries, layers, cross_every)
    case = stage1(config, tokens=tokens, comm=LocalComm() if workers == 1 else TwoAlike(), **options)
    found = compute.stage1_step(case.config, case.local, VOCAB + 1)
    assert (found.forward, found.backward) == pytest.approx(counted_flops(case), rel=SMALL)


@pytest.mark.parametrize(
    ("compression", "read"),
    [(TokenDropConfig(keep=0.5), 21), (TokenDropConfig(keep=0.3, class_token=True, fuse=False), 13)],
)
def test_of_dropped_image_tokens_nothing_is_computed(compression: TokenDropConfig, read: int) -> None:
    case = stage1(qformer(4, compression=compression), tokens=40)
    assert case.local.tokens == read
    found = compute.stage1_step(case.config, case.local, VOCAB + 1)
    assert (found.forward, found.backward) == pytest.approx(counted_flops(case), rel=SMALL)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_that_leaves_losses_out(step: int) -> None:
    case = stage1(qformer(4), itm_every=2, itg_every=3, step=step)
    found = compute.stage1_step(case.config, case.local, VOCAB + 1, itm=step % 2 == 0, itg=step % 3 == 0)
    # A head whose loss is left out runs on one row.
    assert (found.forward, found.backward) == pytest.approx(counted_flops(case), rel=0.01)


def test_the_mean_step_is_that_of_the_cycle() -> None:
    case = stage1(qformer(4), itm_every=2, itg_every=3)
    steps = [
        compute.stage1_step(case.config, case.local, VOCAB + 1, itm=n % 2 == 0, itg=n % 3 == 0).total for n in range(6)
    ]
    mean = sum(compute.stage1(case.config, case.local, VOCAB + 1).values(), Flops())
    assert mean.total == pytest.approx(sum(steps) / 6)
    assert max(steps) > 1.5 * min(steps)


@pytest.mark.parametrize("options", [{}, {"weights": {"itm": 0.0}}, {"weights": {"itg": 0.0}}])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_in_parts_runs_forward_twice(workers: int, options: dict[str, Any]) -> None:
    """Texts of one length, or a part would have a share of the tokens that is not its share of the images."""
    comm = LocalComm() if workers == 1 else TwoAlike()
    case = stage1(qformer(4), micro_batch=2, longest=4, comm=comm, **options)
    assert case.batch.mask_BT is not None
    case = replace(case, local=replace(case.local, text_rows=float(case.batch.mask_BT.sum())))
    found = compute.stage1_step(case.config, case.local, VOCAB + 1, micro_batch=2)
    assert found.total == pytest.approx(sum(counted_flops(case)), rel=0.02)
    assert found.total > 1.3 * compute.stage1_step(case.config, case.local, VOCAB + 1).total


def test_gradient_checkpointing_runs_the_layers_again() -> None:
    case = stage1(qformer(4), recompute=True)
    found = compute.stage1_step(case.config, case.local, VOCAB + 1, recompute=True)
    assert found.total == pytest.approx(sum(counted_flops(case)), rel=SMALL)
    assert found.total > 1.2 * compute.stage1_step(case.config, case.local, VOCAB + 1).total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_stage2(family: str, recompute: bool, tmp_path: Path) -> None:
    case = stage2(family, tmp_path, qformer(4), recompute=recompute)
    sizes = measure_language(case.config.language.weights)
    parts = compute.stage2_parts(case.config.qformer, case.local, sizes, recompute=recompute)
    prefix = case.batch.prefix_ids_BT
    longest = case.local.longest
    read, predicted = (4 + longest - 1, 0) if prefix is None else (4 + prefix.shape[1], longest)
    found = sum(parts.values(), Flops()) + compute.frozen_language(
        sizes, case.local.images, read, predicted, case.local.labels, recompute=recompute
    )
    # The output layer's gradient is made in the forward pass, so only the sum can be compared.
    assert found.total == pytest.approx(sum(counted_flops(case)), rel=SMALL)
