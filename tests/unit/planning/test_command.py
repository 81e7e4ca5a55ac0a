"""``isthmus plan`` on the recipes that ship."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from isthmus import cli

ROOT = Path(__file__).resolve().parents[3]
STAGE1 = str(ROOT / "pipelines/blip2/stage1.yaml")
STAGE2 = str(ROOT / "pipelines/blip2/stage2-opt.yaml")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str) -> tuple[int, str, str]:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(["plan", *words])
        finally:
            signal.signal(signal.SIGTERM, before)
        shown = capfd.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_blip2s_own_first_stage(run: Any) -> None:
    code, out, err = run(STAGE1, "--gpu", "a100-40", "--nodes", "2", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["run"]["images_per_worker"] == 105
    assert plan["parameters"]["trained"] == 186_705_470  # counted from LAVIS's code, with all heads of stage 1
    assert plan["stages"]["1"]["fits"]
    assert plan["whole"]["samples seen"] == 250_000 * 1680


def test_blip2s_own_second_stage(run: Any) -> None:
    code, out, err = run(STAGE2, "--parent", STAGE1, "--gpu", "a100-40", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == {
        "image encoder, frozen": 1_011_146_112, "language model, frozen": 2_651_596_800, "trained": 107_133_696,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((STAGE1, "--gpu", "h20"), "Did you mean 'h200'?"),
        ((STAGE1, "--gpu", "h100", "--nodes", "3", "--gpus-per-node", "3"), "train.global_batch=1674 or"),
        ((STAGE1, "--gpu", "h100", "--epochs", "3"), "needs --samples"),
        ((STAGE1, "--gpu", "h100", "--mfu", "30"), "--mfu 30 is no share"),
        ((STAGE1, "--gpu", "h100", "--network-gbps", "0"), "carries nothing"),
        ((STAGE1, "--gpu", "h100", "--nodes", "3"), "does not divide among 3 nodes"),
        ((STAGE1, "--gpu", "h100", "--longest-caption", "5"), "less than the average"),
        ((STAGE2, "--gpu", "h100"), "Give the stage-1 recipe: --parent RECIPE."),
    ],
)
def test_nonsense_is_refused_with_a_sentence(run: Any, words: tuple[str, ...], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
