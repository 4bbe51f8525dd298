"""Eigenvalues of symmetric matrices: LAPACK for what fits, Lanczos for what does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from hesscli.errors import NumericalError
from hesscli.spectrum.tiles import tiles

LAPACK_LIMIT = 4096
"""Up to this size LAPACK is used: a few seconds, and multiple eigenvalues come out as often as they occur."""


def _both_ends(values: np.ndarray) -> np.ndarray:
    """Largest, smallest, second largest, second smallest, ..."""
    order = np.argsort(-values, kind="stable")
    half = (len(order) + 1) // 2
    mixed = np.empty_like(order)
    mixed[0::2], mixed[1::2] = order[:half], order[half:][::-1]
    return mixed


WHICH = {
    "largest": lambda values: np.argsort(-values, kind="stable"),
    "smallest": lambda values: np.argsort(values, kind="stable"),
    "magnitude": lambda values: np.argsort(-np.abs(values), kind="stable"),
    "both": _both_ends,
}
"""How eigenvalues are ordered: which come first."""

_ARPACK = {"largest": "LA", "smallest": "SA", "magnitude": "LM", "both": "BE"}


def allowed(
    values: np.ndarray | float, tolerance: float, largest: float, rounding: float
) -> np.ndarray:
    """The residuals with which eigenvalues have converged: tolerance |lambda|.

    Zero has no relative error to reach: what is no more than 3 % of the tolerance times the largest value has converged
    when its residual is no more either. With a tolerance of zero, that is what rounding leaves.
    """
    sizes = np.abs(values)
    if not tolerance:
        return np.full_like(sizes, rounding)
    zero = 0.03 * tolerance * largest
    return np.where(sizes <= zero, zero, tolerance * sizes)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues in the order asked for, each with the block it belongs to."""

    values: np.ndarray  # [k]
    vectors: np.ndarray  # [k, n], rows; zero outside the block
    residuals: np.ndarray  # [k], ||H v - lambda v||
    blocks: list[str]  # [k]


class _Pair(NamedTuple):
    value: float
    vector: np.ndarray  # within its block
    residual: float
    block: str
    offset: int  # of the block


def top_eigenpairs(
    blocks: Iterable[tuple[str, int, np.ndarray]], size: int, top: int, which: str
) -> Eigenpairs:
    """The first `top` eigenpairs of a block-diagonal matrix.

    Args:
        blocks: (name, offset, array) of each block: [n, n], or [n] for a diagonal one. Read one at a time.
        which: one of `WHICH`.
    """
    pairs: list[_Pair] = []
    for name, offset, array in blocks:
        solve = _diagonal if array.ndim == 1 else _matrix
        values, columns, errors = solve(array, min(top, array.shape[0]), which)
        pairs += [
            _Pair(value, vector, error, name, offset)
            for value, vector, error in zip(values, columns.T, errors, strict=True)
        ]
        best = WHICH[which](np.array([pair.value for pair in pairs]))[:top]
        pairs = [pairs[i] for i in best]
    if which == "both":
        pairs.sort(key=lambda pair: -pair.value)
    rows = np.zeros((len(pairs), size))
    for row, pair in zip(rows, pairs, strict=True):
        row[pair.offset : pair.offset + len(pair.vector)] = pair.vector
    return Eigenpairs(
        np.array([pair.value for pair in pairs]),
        rows,
        np.array([pair.residual for pair in pairs]),
        [pair.block for pair in pairs],
    )


def extremes(matrix: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a large symmetric matrix [n, n], by Lanczos."""
    return float(_lanczos(matrix, 1, "SA")[0][0]), float(_lanczos(matrix, 1, "LA")[0][0])


def _diagonal(entries: np.ndarray, k: int, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    best = WHICH[which](entries)[:k]
    columns = np.zeros((len(entries), k))
    columns[best, np.arange(k)] = 1
    return entries[best].astype(np.float64), columns, np.zeros(k)


def _matrix(matrix: np.ndarray, k: int, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = matrix.shape[0]
    if n <= LAPACK_LIMIT or k >= n - 1:
        from scipy.linalg import eigh

        subset = {"largest": (n - k, n - 1), "smallest": (0, k - 1)}.get(which)
        values, columns = eigh(
            matrix.astype(np.float64),
            check_finite=False,
            overwrite_a=True,
            subset_by_index=subset,
            driver="evd" if subset is None else "evr",
        )
    else:
        values, columns = _lanczos(matrix, k, _ARPACK[which])
    best = WHICH[which](values)[:k]
    values, columns = values[best], columns[:, best]
    errors = np.linalg.norm(_product(matrix, columns) - columns * values, axis=0)
    return values, columns, errors


def _lanczos(matrix: np.ndarray, k: int, which: str) -> tuple[np.ndarray, np.ndarray]:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    n = matrix.shape[0]
    if not matrix.any():
        return np.zeros(k), np.eye(n, k)  # ARPACK refuses to start
    operator = LinearOperator((n, n), partial(_product, matrix), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(n)  # the same command gives the same bytes
    try:
        return eigsh(operator, k, which=which, v0=start, ncv=min(n, max(2 * k + 1, 40)))
    except ArpackNoConvergence as error:
        raise NumericalError(f"Lanczos: {error}") from None


def _product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """In float64, reading the matrix in tiles."""
    return np.concatenate([matrix[tile].astype(np.float64) @ x for tile in tiles(matrix)])
