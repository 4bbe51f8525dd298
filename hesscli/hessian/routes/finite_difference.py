"""Central differences of gradients: for operators that PyTorch cannot differentiate twice.

Column i of a block is `(g(theta + h e_i) - g(theta - h e_i)) / 2h`, extrapolated (see `quotients.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.batch import Batch
from hesscli.hessian.blocks import Block
from hesscli.hessian.problem import Problem, parameters_at
from hesscli.hessian.quotients import Quotients
from hesscli.hessian.routes.base import Route, Rows
from hesscli.hessian.words import FINITE_DIFFERENCE


class FiniteDifference(Route):
    name = FINITE_DIFFERENCE

    def __init__(self, reference: Callable[[], Problem]) -> None:
        """
        Args:
            reference: makes what is differentiated, in float64 if the model allows.
        """
        self._reference = reference

    @cached_property
    def problem(self) -> Problem:  # type: ignore[override]
        return self._reference()

    @cached_property
    def quotient(self) -> Quotients:
        return Quotients(self.problem.dtype)

    def finish(self, matrix: Tensor) -> None:
        # What has no gradient of its own is a constant to PyTorch, though the loss may depend on it (a padding row).
        matrix[~matrix.any(0)] = 0

    def add(self, batch: Batch, rows: Sequence[Rows]) -> None:
        for part in rows:
            for row, name, index in _entries(part.block):
                if part.start <= row < part.stop:
                    values = self._column(batch, part.block, name, index)
                    part.out[row - part.start] += values[part.start :]

    def add_diagonal(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor]
    ) -> None:
        for block in blocks:
            for row, name, index in _entries(block):
                sums[block.name][row] += self._column(batch, block, name, index)[row]

    def _column(self, batch: Batch, block: Block, name: str, index: int) -> Tensor:
        leaf = self.problem.parameters[name]
        one = replace(self.problem, batches=[batch])

        def gradient(step: float) -> Tensor:
            moved = leaf.detach().clone(memory_format=torch.contiguous_format)
            moved.view(-1)[index] += step
            with parameters_at([leaf], [moved]):
                return one.flat_gradient(block.parameters)

        return self.quotient(gradient, max(1.0, float(leaf.detach().reshape(-1)[index].abs())))


def _entries(block: Block) -> Iterator[tuple[int, str, int]]:
    """(row, parameter, entry of the parameter) of every row of a block."""
    row = 0
    for name, size in zip(block.parameters, block.sizes, strict=True):
        for index in range(size):
            yield row, name, index
            row += 1
