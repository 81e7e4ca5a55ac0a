"""How alike two encoders see the same samples: centred kernel alignment (Kornblith et al. 2019).

CKA of two Gram matrices is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)). The plain estimator is biased: of independent
features it is far above zero unless there are many more samples than dimensions. The estimator of Song et al. (2012)
has no such bias, and gives about zero there. What permuted pairs give is computed beside either.

Everything is float64 inside. N samples, D and E widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isthmus.errors import DataError

LEAST = 4
"""Samples that the estimator without bias needs."""

BLOCK = 2048  # rows that are worked on at once
MEDIAN_ROWS = 2048  # rows whose distances give the width of an RBF kernel


class Kernel(Protocol):
    """A Gram matrix [N, N], held or implied.

    Attributes:
        diagonal_N: of the matrix.
        sums_N: of its rows.
    """

    diagonal_N: np.ndarray
    sums_N: np.ndarray

    def inner(self, other: Kernel, order_N: np.ndarray | None = None) -> float:
        """Sum of products with the elements of ``other``, whose samples are taken in ``order_N``."""
        ...


class Covariance:
    """The linear kernel of features, without its matrix: memory for D x E products, whatever N is.

    Args:
        x_ND: features, float32 or float64; they are centred here.
    """

    def __init__(self, x_ND: np.ndarray) -> None:
        self._x, self._mean = x_ND, _mean(x_ND)
        self.diagonal_N = np.concatenate([(rows * rows).sum(1) for rows in self._blocks()])
        total = sum(rows.sum(0) for rows in self._blocks())  # zero but for rounding
        self.sums_N = np.concatenate([rows @ total for rows in self._blocks()])

    def _blocks(self, order_N: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Some rows at a time, centred, in float64: all of them would be twice the features again."""
        starts = range(0, len(self._x), BLOCK)
        places = (slice(s, s + BLOCK) if order_N is None else order_N[s : s + BLOCK] for s in starts)
        return (self._x[place].astype(np.float64) - self._mean for place in places)

    def inner(self, other: Kernel, order_N: np.ndarray | None = None) -> float:
        """||Xc' Yc||^2, accumulated over blocks of rows."""
        assert isinstance(other, Covariance)
        cross_DE = sum(a.T @ b for a, b in zip(self._blocks(), other._blocks(order_N), strict=True))
        return float((cross_DE * cross_DE).sum())


class Gram:
    """A Gram matrix that is held: N x N values."""

    def __init__(self, matrix_NN: np.ndarray) -> None:
        self._matrix = matrix_NN
        self.diagonal_N, self.sums_N = np.diagonal(matrix_NN).astype(np.float64), matrix_NN.sum(1, dtype=np.float64)

    def inner(self, other: Kernel, order_N: np.ndarray | None = None) -> float:
        """A block of rows at a time."""
        assert isinstance(other, Gram)
        total = 0.0
        for start in range(0, len(self._matrix), BLOCK):
            mine, place = self._matrix[start : start + BLOCK], slice(start, start + BLOCK)
            theirs = other._matrix[place] if order_N is None else other._matrix[order_N[place]][:, order_N]
            total += float(np.vdot(mine, theirs))
        return total


def linear_gram(x_ND: np.ndarray) -> Gram:
    """The linear kernel of centred features as a matrix."""
    x = x_ND.astype(np.float64) - _mean(x_ND)
    return Gram(x @ x.T)


def rbf_gram(x_ND: np.ndarray) -> Gram:
    """exp(-d^2 / 2 s^2), where s^2 is the median of the squared distances that are not zero.

    As in the paper's code; of more than :data:`MEDIAN_ROWS` samples, evenly spaced ones give the median (our shortcut).
    """
    x = x_ND.astype(np.float64) - _mean(x_ND)
    distances = _distances(x[:: -(-len(x) // MEDIAN_ROWS)])
    matrix = _distances(x)
    matrix *= -0.5 / float(np.median(distances[distances > 0]))
    return Gram(np.exp(matrix, out=matrix))


def _mean(x_ND: np.ndarray) -> np.ndarray:
    if not np.isfinite(x_ND).all() or (x_ND == x_ND[0]).all():
        raise DataError("The features of an encoder are all equal, or not finite.", "Is it the encoder that was meant?")
    mean: np.ndarray = x_ND.mean(0, dtype=np.float64)
    return mean


def _distances(x_ND: np.ndarray) -> np.ndarray:
    """Squared distances [N, N]; zero between a sample and itself, exactly."""
    squares = (x_ND * x_ND).sum(1)
    out: np.ndarray = squares[:, None] + squares[None, :]
    out -= 2 * (x_ND @ x_ND.T)
    np.maximum(out, 0, out=out)
    np.fill_diagonal(out, 0)
    return out


def hsic(a: Kernel, b: Kernel, order_N: np.ndarray | None = None) -> tuple[float, float]:
    """(biased, without bias) Hilbert-Schmidt independence criterion, each up to the same factor for any kernels.

    Args:
        order_N: the samples of ``b`` in this order.
    """
    n = len(a.diagonal_N)
    order = np.arange(n) if order_N is None else order_N
    product, da, db, sa, sb = a.inner(b, order_N), a.diagonal_N, b.diagonal_N[order], a.sums_N, b.sums_N[order]
    biased = product - 2 / n * float(sa @ sb) + float(sa.sum()) * float(sb.sum()) / n**2
    # Song et al. leave the diagonals out.
    ra, rb = sa - da, sb - db
    totals = float(ra.sum()) * float(rb.sum()) / ((n - 1) * (n - 2))
    return biased, product - float(da @ db) + totals - 2 / (n - 2) * float(ra @ rb)


@dataclass(frozen=True)
class Similarity:
    """CKA of one pair of encoders with one kernel.

    Attributes:
        samples: N.
        biased, debiased: the two estimates.
        biased_permuted, debiased_permuted: mean over permuted pairs.
        debiased_permuted_most: the largest of them.
    """

    samples: int
    biased: float
    debiased: float
    biased_permuted: float
    debiased_permuted: float
    debiased_permuted_most: float


def similarity(a: Kernel, b: Kernel, *, permutations: int = 10, seed: int = 0) -> Similarity:
    """CKA of two kernels over the same samples, and of permuted pairs.

    Raises:
        DataError: fewer than four samples, or features that are all equal or not finite.
    """
    n = len(a.diagonal_N)
    if n < LEAST:
        raise DataError(f"CKA of {n} samples says nothing.", f"Take {LEAST} at least; hundreds to be of use.")
    norms = [math.sqrt(x) * math.sqrt(y) for x, y in zip(_norms(a), _norms(b), strict=True)]
    random = np.random.default_rng(seed)
    found = [hsic(a, b)] + [hsic(a, b, random.permutation(n)) for _ in range(permutations)]
    biased, debiased = (np.array([value[i] for value in found]) / norms[i] for i in (0, 1))
    return Similarity(
        samples=n,
        biased=float(biased[0]),
        debiased=float(debiased[0]),
        biased_permuted=float(biased[1:].mean()) if permutations else math.nan,
        debiased_permuted=float(debiased[1:].mean()) if permutations else math.nan,
        debiased_permuted_most=float(debiased[1:].max()) if permutations else math.nan,
    )


def linear_cka(x_ND: np.ndarray, y_NE: np.ndarray, *, debiased: bool = False) -> float:
    """Linear CKA of two sets of features of the same samples."""
    found = similarity(Covariance(x_ND), Covariance(y_NE), permutations=0)
    return found.debiased if debiased else found.biased


def _norms(kernel: Kernel) -> tuple[float, float]:
    """HSIC of a kernel with itself. Without bias it is nothing where all samples are equally far apart, and then
    infinite here, so that the similarity is 0."""
    biased, debiased = hsic(kernel, kernel)
    return biased, debiased if debiased > 1e-12 * biased else math.inf
