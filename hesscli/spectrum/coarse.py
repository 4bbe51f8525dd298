"""|H| on a grid of a few cells: each cell is the largest magnitude of what it covers, so that structure survives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hesscli.spectrum.tiles import tiles


def pool_matrix(
    grid: np.ndarray, matrix: np.ndarray, offset: int, size: int, done: Callable[[int], None]
) -> None:
    """Draws a diagonal block onto the grid of the whole matrix, reading it in tiles.

    Args:
        grid: [k, k], k <= size. Cells only grow.
        matrix: [n, n], the block.
        offset: the row of the whole matrix that the block begins with.
        done: told how many rows of the block have been read.
    """
    n = matrix.shape[0]
    if not n:
        return
    cells, starts = _cells(n, offset, size, len(grid))
    for tile in tiles(matrix):
        pooled = np.maximum.reduceat(np.abs(matrix[tile]), starts, axis=1)
        rows, tops = _cells(len(pooled), offset + tile.start, size, len(grid))
        seen = np.ix_(rows, cells)
        grid[seen] = np.maximum(grid[seen], np.maximum.reduceat(pooled, tops, axis=0))
        done(tile.stop)


def pool_vector(entries: np.ndarray, cells: int) -> np.ndarray:
    """The magnitudes of `entries` [n] as so many cells; a few entries are stretched over them."""
    n = len(entries)
    if n < cells:
        return np.abs(entries[np.arange(cells) * n // cells])
    return np.maximum.reduceat(np.abs(entries), _cells(n, 0, n, cells)[1])


def _cells(n: int, offset: int, size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells, of k for `size` rows, that rows `offset` to `offset + n` fall into, and where each begins."""
    return np.unique((offset + np.arange(n)) * k // size, return_index=True)
