"""Formulas of kept bytes against what autograd holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.config import TokenDropConfig
from isthmus.contracts import LocalComm
from isthmus.planning import activations, compute, language
from isthmus.planning.activations import Keeping
from isthmus.planning.frozen import measure_language
from isthmus.planning.subject import matrices
from planning_cases import FAMILIES, VOCAB, TwoAlike, kept_of, qformer, stage1, stage2

CLOSE = 0.02  # small tables of similarities, counts and indices are left out


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("queries", "tokens", "how", "weights"),
    [
        *((8, 60, "projected", {}), (1, 60, "direct", {})),
        *((2, 60, "direct", {"itm": 0.0}), (8, 19, "projected", {"itg": 0.0})),
    ],
    ids=["projected", "direct", "without itm", "without itg"],
)
def test_stage1(
    queries: int, tokens: int, how: str, weights: dict[str, float], dropout: float, bf16: bool, workers: int
) -> None:
    config = qformer(queries, dropout=dropout)
    comm = LocalComm() if workers == 1 else TwoAlike()
    case = stage1(config, tokens=tokens, comm=comm, weights=weights)
    keeping = Keeping(bf16=bf16, cuda=False)
    assert compute.reading(config, tokens, compute.stage1_uses(workers, "itm" not in weights)) == how
    found = sum(activations.stage1_parts(keeping, case.config, case.local, VOCAB + 1).values())
    found += activations.weight_copies(keeping, matrices(case.module))
    assert found == pytest.approx(kept_of(case, bf16=bf16), rel=CLOSE)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("queries", [1, 8])
def test_of_dropped_image_tokens_nothing_is_kept(queries: int, bf16: bool) -> None:
    keeping, found = Keeping(bf16=bf16, cuda=False), []
    for compression in (None, TokenDropConfig(keep=0.5)):
        case = stage1(qformer(queries, compression=compression), tokens=60)
        kept = sum(activations.stage1_parts(keeping, case.config, case.local, VOCAB + 1).values())
        found.append(kept + activations.weight_copies(keeping, matrices(case.module)))
        assert found[-1] == pytest.approx(kept_of(case, bf16=bf16), rel=CLOSE)
    assert found[1] < 0.96 * found[0]


def test_gradient_checkpointing_keeps_the_layers_inputs() -> None:
    case = stage1(qformer(4, layers=6), recompute=True)
    keeping = Keeping(bf16=False, cuda=False)
    parts = activations.stage1_parts(keeping, case.config, case.local, VOCAB + 1, recompute=True)
    whole = activations.stage1_parts(keeping, case.config, case.local, VOCAB + 1)
    # The plan adds the one layer that is being recomputed, which is not there at the end of the forward pass.
    assert kept_of(case) < sum(parts.values()) < 0.6 * sum(whole.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stage2(family: str, bf16: bool, tmp_path: Path) -> None:
    config = qformer(4)
    case = stage2(family, tmp_path, config, bf16=bf16)
    sizes = measure_language(case.config.language.weights)
    keeping = Keeping(bf16=bf16, cuda=False)
    prefix, images = case.batch.prefix_ids_BT, case.local.images
    read, predicted = (4 + case.local.longest - 1, 0) if prefix is None else (4 + prefix.shape[1], case.local.longest)
    rows = language.Rows(read, predicted, case.local.labels / images)
    how = compute.reading(config, case.local.tokens, 1.0)
    assert how == "direct"
    found = language.bytes_kept(keeping, sizes, images, rows)
    found += activations.image_memory(keeping, config, case.local, projections=0, matched=False)
    found += activations.qformer_pass(keeping, config, case.local, compute.Pass(images, 4, how=how))
    found += keeping.inputs(images * 4, 1) * config.width
    found += activations.weight_copies(keeping, matrices(case.module))
    assert found == pytest.approx(kept_of(case, bf16=bf16), rel=0.06)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_the_language_model_s_inputs(family: str, tmp_path: Path) -> None:
    config = qformer(4)
    case = stage2(family, tmp_path, config, recompute=True)
    sizes = measure_language(case.config.language.weights)
    keeping = Keeping(bf16=False, cuda=False)
    prefix, images = case.batch.prefix_ids_BT, case.local.images
    read, predicted = (4 + case.local.longest - 1, 0) if prefix is None else (4 + prefix.shape[1], case.local.longest)
    rows = language.Rows(read, predicted, case.local.labels / images)
    rest = activations.image_memory(keeping, config, case.local, projections=0, matched=False)
    rest += activations.qformer_pass(keeping, config, case.local, compute.Pass(images, 4, how="direct"), recompute=True)
    rest += keeping.inputs(images * 4, 1) * config.width
    whole = language.bytes_kept(keeping, sizes, images, rows)
    found = language.bytes_kept(keeping, sizes, images, rows, recompute=True)
    # The plan adds the one layer that is being recomputed, which is not there at the end of the forward pass.
    layers = sizes.decoder.layers
    assert 0.8 * kept_of(case) < rest + found < rest + whole, layers


@pytest.mark.parametrize(("dropout", "less"), [(0.0, True), (0.1, False)])
def test_an_accelerator_keeps_no_attention_weights_unless_some_are_dropped(dropout: float, less: bool) -> None:
    case = stage1(qformer(4, dropout=dropout))
    here, there = (
        sum(activations.stage1_parts(Keeping(bf16=True, cuda=cuda), case.config, case.local, VOCAB + 1).values())
        for cuda in (False, True)
    )
    assert (there < here) == less
