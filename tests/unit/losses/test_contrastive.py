"""The contrastive loss: closed forms, padding, image ids, gather semantics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from isthmus.contracts import LocalComm
from isthmus.losses.contrastive import contrast, contrast_reference, smoothing_floor

ONE = torch.ones(1)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def valid(rows: int) -> torch.Tensor:
    return torch.ones(rows, dtype=torch.bool)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_features_cost_ln_n(smoothing: float) -> None:
    image, text = unit(1, 1, 4).expand(6, 3, 4), unit(1, 4, seed=1).expand(6, 4)
    found = contrast(image, text, ONE, valid(6), LocalComm(), smoothing=smoothing)
    assert float(found.loss) == pytest.approx(math.log(6), abs=1e-6)
    assert float(found.recall_at_1(found.i2t_BG)) == 0.0  # ties are misses


@pytest.mark.parametrize(("rows", "floor"), [(8, 0.467), (64, 0.730), (100, 0.778), (256, 0.876)])
def test_perfect_separation_reaches_the_smoothing_floor(rows: int, floor: float) -> None:
    assert smoothing_floor(rows, 0.1) == pytest.approx(floor, abs=1e-3)
    assert contrast_reference(rows, 0.1).floor == smoothing_floor(rows, 0.1)
    eye = torch.eye(rows)
    top = 0.9 + 0.1 / rows
    temperature = torch.tensor([1 / math.log(top * rows / 0.1)])  # the one at which the softmax is the target
    found = contrast(eye.unsqueeze(1), eye, temperature, valid(rows), LocalComm(), smoothing=0.1)
    assert float(found.loss) == pytest.approx(floor, abs=1e-3)
    assert float(found.recall_at_1(found.t2i_BG)) == 1.0
    sharp = contrast(eye.unsqueeze(1), eye, torch.tensor([0.01]), valid(rows), LocalComm())
    assert float(sharp.loss) == pytest.approx(0.0, abs=1e-6)


def test_it_is_torchs_smoothed_cross_entropy_over_the_best_query() -> None:
    image, text = unit(5, 3, 8), unit(5, 8, seed=1)
    sims = torch.einsum("iqe,je->ijq", image, text).amax(-1) / 0.07
    target = torch.arange(5)
    expected = (
        F.cross_entropy(sims, target, label_smoothing=0.1) + F.cross_entropy(sims.T, target, label_smoothing=0.1)
    ) / 2
    found = contrast(image, text, torch.tensor([0.07]), valid(5), LocalComm(), smoothing=0.1)
    torch.testing.assert_close(found.loss, expected)


def test_padding_rows_count_neither_as_rows_nor_as_columns() -> None:
    image, text = unit(5, 2, 8), unit(5, 8, seed=1)
    real = contrast(image, text, ONE, valid(5), LocalComm(), smoothing=0.1)
    padded = contrast(
        torch.cat([image, image[:3]]),
        torch.cat([text, text[:3]]),
        ONE,
        torch.cat([valid(5), ~valid(3)]),
        LocalComm(),
        smoothing=0.1,
    )
    torch.testing.assert_close(padded.loss, real.loss)


def test_nothing_but_padding_is_zero_with_a_gradient() -> None:
    image = unit(2, 1, 4).requires_grad_()
    found = contrast(image, unit(2, 4), ONE, ~valid(2), LocalComm())
    found.loss.backward()
    assert float(found.loss.detach()) == 0.0 and torch.equal(image.grad, torch.zeros_like(image))


def test_rows_of_one_image_are_positives_of_one_another() -> None:
    image, text = unit(4, 2, 8), unit(4, 8, seed=1)
    ids = torch.tensor([7, 9, 7, 3])
    found = contrast(image, text, ONE, valid(4), LocalComm(), smoothing=0.1, image_ids_B=ids)
    same = (ids.unsqueeze(0) == ids.unsqueeze(1)).float()
    target = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / 4
    sims = torch.einsum("iqe,je->ijq", image, text).amax(-1)
    expected = -((target * sims.log_softmax(1)).sum(1) + (target * sims.T.log_softmax(1)).sum(1)).mean() / 2
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.positives_BG, same.bool())


def test_one_process_keeps_the_two_gather_semantics_apart() -> None:
    """The same loss, another gradient: detached columns are constants even when they are this process's own."""
    gradients = []
    for full in (False, True):
        image, text = unit(4, 2, 8).requires_grad_(), unit(4, 8, seed=1).requires_grad_()
        contrast(image, text, torch.tensor([0.1]), valid(4), LocalComm(), full_gradient=full).loss.backward()
        gradients.append((image.grad, text.grad))
    reference = unit(4, 2, 8).requires_grad_()
    text = unit(4, 8, seed=1)
    sims = torch.einsum("iqe,je->ijq", reference, text).amax(-1) / 0.1
    target = torch.arange(4)
    ((F.cross_entropy(sims, target) + F.cross_entropy(sims.T, target)) / 2).backward()
    torch.testing.assert_close(gradients[1][0], reference.grad)
    assert not torch.allclose(gradients[0][0], reference.grad, atol=1e-3)
    rows_only = unit(4, 2, 8).requires_grad_()
    sims = torch.einsum("iqe,je->ijq", rows_only, text).amax(-1) / 0.1
    (F.cross_entropy(sims, target) / 2).backward()
    torch.testing.assert_close(gradients[0][0], rows_only.grad)


def test_one_row_and_one_query_keep_their_axes() -> None:
    found = contrast(unit(1, 1, 4), unit(1, 4, seed=1), ONE, valid(1), LocalComm())
    assert found.i2t_BG.shape == found.t2i_BG.shape == (1, 1) and float(found.loss) == pytest.approx(0.0)
