"""CKA: its forms agree, known answers, what it is invariant to, and the bias that it has and has not."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from isthmus.alignment import cka
from isthmus.alignment.cka import BLOCK, Covariance, Gram, hsic, linear_cka, linear_gram, rbf_gram, similarity
from isthmus.errors import DataError


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def related(n: int, d: int, e: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    z = normal(n, 5, seed=seed)
    return (
        z @ normal(5, d, seed=seed + 1) + 0.5 * normal(n, d, seed=seed + 2) + 3.0,
        z @ normal(5, e, seed=seed + 3) + 0.5 * normal(n, e, seed=seed + 4) - 1.0,
    )


@pytest.mark.parametrize(("n", "d", "e"), [(60, 7, 5), (30, 50, 40), (9, 3, 200)])
def test_covariance_and_gram_forms_are_equal(n: int, d: int, e: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka, "BLOCK", 8)
    x, y = related(n, d, e)
    by_width, by_sample = similarity(Covariance(x), Covariance(y)), similarity(linear_gram(x), linear_gram(y))
    for name in ("biased", "debiased", "biased_permuted", "debiased_permuted", "debiased_permuted_most"):
        assert getattr(by_width, name) == pytest.approx(getattr(by_sample, name), rel=1e-10, abs=1e-12), name


def test_the_biased_value_is_the_published_formula() -> None:
    x, y = related(40, 6, 9)
    xc, yc = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    assert linear_cka(x, y) == pytest.approx(norm(yc.T @ xc) ** 2 / (norm(xc.T @ xc) * norm(yc.T @ yc)), rel=1e-12)


@pytest.mark.parametrize("make", [linear_gram, rbf_gram])
def test_hsic_is_the_definition(make: object) -> None:
    x, y = related(12, 3, 4)
    a, b = make(x), make(y)  # type: ignore[operator]
    n, K, L = 12, a._matrix, b._matrix
    H = np.eye(n) - 1 / n
    biased, debiased = hsic(a, b)
    assert biased == pytest.approx(np.trace(K @ H @ L @ H), rel=1e-10)
    K, L, one = K - np.diag(np.diag(K)), L - np.diag(np.diag(L)), np.ones(n)
    song = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)
    assert debiased == pytest.approx(song, rel=1e-9)


def test_known_answers() -> None:
    x = normal(50, 6)
    y = np.concatenate([x, np.zeros((50, 2))], 1)
    for debiased in (False, True):
        assert linear_cka(x, y, debiased=debiased) == pytest.approx(1.0, abs=1e-12)
    # Orthogonal directions of equal strength: the one that is shared of two gives one half.
    h = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    assert linear_cka(h[:, :2], h[:, 1:]) == pytest.approx(0.5)
    assert linear_cka(h[:, :1], h[:, 1:2]) == pytest.approx(0.0, abs=1e-15)
    assert linear_cka(h[:, :1], h) == pytest.approx(1 / np.sqrt(3))
    assert linear_cka(h[:, :1], h, debiased=True) == 0.0  # four samples equally far apart say nothing of one another


@pytest.mark.parametrize("kernel", [Covariance, rbf_gram])
def test_rotation_scale_and_shift_change_nothing(kernel: type[Covariance]) -> None:
    x, y = related(80, 8, 6)
    turned = 7.5 * x @ np.linalg.qr(normal(8, 8, seed=9))[0] + 2.0
    before, after = similarity(kernel(x), kernel(y)), similarity(kernel(turned), kernel(y))
    for name in ("biased", "debiased", "debiased_permuted"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9)
    skewed = similarity(kernel(x * np.arange(1, 9) ** 2), kernel(y))
    assert abs(skewed.biased - before.biased) > 1e-3  # it is not invariant to any linear map


@pytest.mark.parametrize(("n", "biased"), [(50, 0.948), (500, 0.636)])
def test_independent_gaussians_look_alike_to_the_biased_estimate_alone(n: int, biased: float) -> None:
    x, y = normal(n, 768), normal(n, 1024, seed=1)
    found = similarity(Covariance(x), Covariance(y), permutations=3)
    assert found.biased == pytest.approx(biased, abs=0.005)
    assert found.biased == pytest.approx(found.biased_permuted, abs=0.01)
    assert abs(found.debiased) < 3 / n and abs(found.debiased_permuted) < 3 / n  # its spread falls as 1 / n


def test_permuted_pairs_lie_below_related_ones() -> None:
    x, y = related(200, 16, 12)
    for kernel in (Covariance, rbf_gram):
        found = similarity(kernel(x), kernel(y), permutations=20)
        assert found.debiased > 0.4 > 0.1 > found.debiased_permuted_most
        assert abs(found.debiased_permuted) < 0.005 and found.biased_permuted > 0.01  # what is left is bias


def test_the_rbf_width_is_the_median_distance() -> None:
    x = np.array([[0.0], [1.0], [3.0]])  # squared distances 1, 4, 9
    expected = np.exp(-0.5 * np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / 4)
    np.testing.assert_allclose(rbf_gram(x)._matrix, expected)


def test_float32_features_are_summed_in_float64() -> None:
    x, y = related(300, 10, 10)
    x += 1e3
    found = linear_cka(x.astype(np.float32), y.astype(np.float32))
    assert found == pytest.approx(linear_cka(x, y), abs=1e-4)


def test_the_covariance_form_holds_a_block_at_a_time() -> None:
    x, y = (normal(16 * BLOCK, 8).astype(np.float32) for _ in range(2))
    one, other = Covariance(x), Covariance(y)
    tracemalloc.start()
    one.inner(other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * BLOCK * 8 * 8, "of 32 such blocks"


def test_too_few_or_equal_samples_are_refused() -> None:
    with pytest.raises(DataError, match="CKA of 3 samples"):
        linear_cka(normal(3, 2), normal(3, 2))
    with pytest.raises(DataError, match="all equal"):
        linear_cka(np.ones((9, 2)), normal(9, 2))
    with pytest.raises(DataError, match="all equal"):
        rbf_gram(np.ones((9, 2)))
    assert isinstance(rbf_gram(normal(5, 2)), Gram)
