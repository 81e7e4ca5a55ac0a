"""A batch whose activations are held some rows at a time gives the losses and gradients of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.contracts import Stage
from isthmus.methods import METHODS
from method_cases import batch, build, dropped, recipe, samples

ROWS = 7
METHOD_NAMES = sorted(METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def stage_of(method: str, folder: Path, **changes: Any) -> Stage:
    return build(recipe(method, folder, **dropped(method), **changes))


def step(stage: Stage, micro_batch: int | None, number: int = 0) -> tuple[dict[str, float], dict[str, Any], int]:
    """Logged values, gradients, and the bytes that were saved for the backward pass."""
    module: Any = stage.module.train()
    module.micro_batch = micro_batch
    module.zero_grad()
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        terms = module(batch(stage, samples(stage, ROWS), number, padding=1))
    terms.total.backward()
    values = {name: float(v) for name, v in {"total": terms.total, **terms.parts, **terms.metrics}.items()}
    return values, {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, sum(saved.values())


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_losses_and_gradients_are_those_of_the_whole(method: str, rows: int, folder: Path) -> None:
    stage = stage_of(method, folder)
    values, gradients, _ = step(stage, None)
    found, others, _ = step(stage, rows)
    assert found == pytest.approx(values, abs=2e-6)
    for name, gradient in gradients.items():  # measured: 2.4e-6 apart
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_that_a_step_leaves_out(folder: Path) -> None:
    stage = stage_of("blip2_stage1", folder, itm_every=2, itg_every=3)
    for number in range(1, 4):
        values, gradients, _ = step(stage, None, number)
        found, others, _ = step(stage, 3, number)
        assert found == pytest.approx(values, abs=2e-6)
        assert ("itm" in found, "itg" in found) == (number == 2, number == 3)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_less_is_held_for_the_backward_pass(method: str, folder: Path) -> None:
    stage = stage_of(method, folder)
    whole, parts = step(stage, None)[2], step(stage, 1)[2]
    assert parts < whole / 2, (parts, whole)
