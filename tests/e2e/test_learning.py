"""The learning proof, run for real: minutes on two cores."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_stages_learn_to_compose_and_the_controls_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from learning import prove

    found = prove(seed=0, say=lambda text: print(text, file=sys.stderr, flush=True))
    assert 1e6 <= found["trained_parameters"] <= 3e6
    # what was learnt, on combinations that no part has seen
    assert found["tr_at_1"] > 0.85 * found["r1_ceiling"] and found["ir_at_1"] > 0.85 * found["r1_ceiling"]
    assert found["itm_auc"] > 0.95
    assert found["cider"] > 5
    assert found["vqa"] > 2 * found["vqa_prior"]
    # controls
    assert found["shuffled_tr_at_1"] < 5 * found["r1_chance"] and found["shuffled_ir_at_1"] < 5 * found["r1_chance"]
    assert abs(found["shuffled_itm_auc"] - 0.5) < 0.05
    assert found["no_stage1_vqa"] < found["vqa"] and found["no_stage1_cider"] < found["cider"]
    assert found["no_stage1_lm_loss"] > found["lm_loss"]
    assert found["itg_loss_permuted_images"] > found["itg_loss"] + 0.5
    assert found["lm_loss_permuted_images"] > found["lm_loss"] + 0.3
