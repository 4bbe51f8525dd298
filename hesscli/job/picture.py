"""|H| as a picture: few enough cells for a screen or a page, with the places of its blocks and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hesscli.errors import NumericalError
from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.hessian.blocks import Block, partition
from hesscli.job.options import Progress
from hesscli.spectrum.coarse import pool_matrix, pool_vector

DECADES = 6
"""How far below the largest magnitude colours still differ."""


@dataclass(frozen=True)
class Region:
    """A block, or a parameter in it: rows (and columns) `start` to `stop` of the picture."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Picture:
    """The largest |H| in each cell of a grid."""

    cells: np.ndarray  # [k, k]; or [regions, k] for diagonals, one row for each parameter
    regions: tuple[Region, ...]
    size: int  # rows of the matrix that was drawn
    diagonal: bool

    @property
    def high(self) -> float:
        return float(self.cells.max(initial=0.0))

    @property
    def low(self) -> float:
        """The least magnitude that is told from smaller ones."""
        positive = self.cells[self.cells > 0]
        least = float(positive.min()) if positive.size else 0.0
        return max(least, self.high * 10.0**-DECADES)

    def levels(self) -> np.ndarray:
        """log |H| from 0 (low) to 1 (high), shaped as the cells; NaN where |H| is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(self.cells / self.low)
            span = np.log10(self.high / self.low) if self.high > self.low else 1.0
        shown = 1.0 if self.high == self.low else np.clip(logs / span, 0, 1)
        return np.where(self.cells > 0, shown, np.nan)


def picture(
    file: HessianFile,
    names: Sequence[str],
    pixels: int,
    progress: Progress,
) -> Picture:
    """Draws the named blocks on at most `pixels` rows and columns."""
    structure = file.document["structure"]
    blocks = [b for b in partition(file.shapes, structure) if b.name in names]
    if structure == "elements":
        return _of_diagonals(file, blocks, pixels)
    size = sum(block.size for block in blocks)
    k = max(1, min(pixels, size))
    cells, offset = np.zeros((k, k)), 0
    for block in blocks:

        def done(rows: int, before: int = offset, name: str = block.name) -> None:
            progress(before + rows, size, name)

        pool_matrix(cells, file.values(block.name), offset, size, done)
        offset += block.size
    # The borders of the blocks; within a single one, those of its parameters.
    if len(blocks) == 1:
        (block,) = blocks
        parts = list(zip(block.parameters, block.sizes, strict=True))
    else:
        parts = [(block.name, block.size) for block in blocks]
    edges = np.cumsum([0, *(rows for _, rows in parts)]) * k / max(1, size)
    regions = tuple(
        Region(name, float(start), float(stop))
        for (name, _), start, stop in zip(parts, edges, edges[1:], strict=False)
        if stop > start
    )
    return Picture(_finite(cells), regions, size, diagonal=False)


def _of_diagonals(file: HessianFile, blocks: Sequence[Block], pixels: int) -> Picture:
    """A row for each parameter."""
    filled = [block.name for block in blocks if block.size]
    rows = [pool_vector(file.values(name), pixels) for name in filled]
    cells = np.stack(rows).astype(np.float64) if rows else np.zeros((1, 1))
    regions = tuple(Region(name, row, row + 1) for row, name in enumerate(filled))
    size = sum(block.size for block in blocks)
    return Picture(_finite(cells), regions, size, diagonal=True)


def _finite(cells: np.ndarray) -> np.ndarray:
    if not np.isfinite(cells).all():
        raise NumericalError("the file holds values that are not finite")
    return cells
