"""Central differences of gradients: for operators that PyTorch cannot differentiate twice.

Column i of a block is `(g(theta + h e_i) - g(theta - h e_i)) / 2h`, extrapolated (see `quotients.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hesscli.hessian.autodiff import unit_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.products import Differences, freed
from hesscli.hessian.differences.quotients import Quotients
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.routes.base import Choice, Route, Wanted
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.words import FINITE_DIFFERENCE

GRADIENTS = 4  # that a row takes, where the first step will do and nothing is held


class FiniteDifference(Route):
    """Column after column, by differences of the gradients of another problem than the other routes' own: what
    `reference` makes, the same in float64 if the model runs in it.
    """

    method = FINITE_DIFFERENCE

    def __init__(self, reference: Callable[[], Problem]) -> None:
        self._reference = reference
        self._constants: dict[Block, Tensor] = {}
        self._quotients: dict[Block, Quotients] = {}

    @cached_property
    def problem(self) -> Problem:  # type: ignore[override]
        """Made when a block is first computed: where other routes do, it is not needed."""
        return self._reference()

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        return Choice(self, "", first.rows(block).times(GRADIENTS))

    def _is_constant(self, block: Block) -> Tensor:
        """Which entries have no gradient, at theta or in any direction from there.

        To PyTorch they are constants, though the loss may depend on them (an embedding's padding row).
        """
        if block not in self._constants:
            problem = self.problem.restricted(block.parameters)
            v = torch.randn(block.size, generator=torch.Generator().manual_seed(0))
            products, v = Differences(problem), v.to(problem.device, problem.dtype)
            along = products(v)
            self._constants[block] = (problem.flat_gradient(block.parameters) == 0) & (along == 0)
            self._quotients[block] = freed(products, v, along)
        return self._constants[block]

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        problem = replace(self.problem, batches=[batch])
        for part in parts:
            names, constant = part.block.parameters, self._is_constant(part.block)
            quotient = self._quotients[part.block]
            theta = torch.cat([problem.parameters[name].detach().reshape(-1) for name in names])
            for row in range(part.start, part.stop):
                if not constant[row]:
                    unit = unit_rows(theta, row, 1, len(theta))[0]
                    gradient = partial(problem.moved_gradient, names, unit)
                    column = quotient(gradient, max(1.0, float(theta[row].abs())))
                    part.add(row, column.unsqueeze(0))
