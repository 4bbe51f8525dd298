"""Central differences of gradients: for operators that PyTorch cannot differentiate twice.

Column i of a block is `(g(theta + h e_i) - g(theta - h e_i)) / 2h`, extrapolated (see `quotients.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.differences.quotients import Quotients
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem, parameters_at
from hesscli.hessian.routes.base import Route, Wanted
from hesscli.hessian.words import FINITE_DIFFERENCE


class FiniteDifference(Route):
    name = FINITE_DIFFERENCE

    def __init__(self, reference: Callable[[], Problem]) -> None:
        """
        Args:
            reference: makes what is differentiated, in float64 if the model allows.
        """
        self._reference = reference
        self._constants: dict[Block, Tensor] = {}

    @cached_property
    def problem(self) -> Problem:  # type: ignore[override]
        return self._reference()

    @cached_property
    def quotient(self) -> Quotients:
        return Quotients(self.problem.dtype)

    def _is_constant(self, block: Block) -> Tensor:
        """Which entries have no gradient, at theta or in any direction from there.

        To PyTorch they are constants, though the loss may depend on them (an embedding's padding row).
        """
        if block not in self._constants:
            problem = self.problem.restricted(block.parameters)
            v = torch.randn(block.size, generator=torch.Generator().manual_seed(0))
            along = Differences(problem)(v.to(problem.device, problem.dtype))
            self._constants[block] = (problem.flat_gradient(block.parameters) == 0) & (along == 0)
        return self._constants[block]

    def _entries(self, block: Block) -> Iterator[tuple[int, str, int]]:
        """(row, parameter, entry of the parameter) of every row of a block that is not constant."""
        constant = self._is_constant(block).tolist()
        for name, own in block.rows.items():
            for index, row in enumerate(own):
                if not constant[row]:
                    yield row, name, index

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        for part in parts:
            for row, name, index in self._entries(part.block):
                if part.start <= row < part.stop:
                    part.add(row, self._column(batch, part.block, name, index).unsqueeze(0))

    def _column(self, batch: Batch, block: Block, name: str, index: int) -> Tensor:
        leaf = self.problem.parameters[name]
        one = replace(self.problem, batches=[batch])

        def gradient(step: float) -> Tensor:
            moved = leaf.detach().clone(memory_format=torch.contiguous_format)
            moved.view(-1)[index] += step
            with parameters_at([leaf], [moved]):
                return one.flat_gradient(block.parameters)

        return self.quotient(gradient, max(1.0, float(leaf.detach().reshape(-1)[index].abs())))
