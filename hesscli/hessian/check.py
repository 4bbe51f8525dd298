"""The certificate: computed blocks against central differences of plain gradients.

It shares nothing with the code that made the block: the gradients are those of the original module, without any
operator replaced, in float64 where the module can run in it. For a random direction v within a block B,

    error = || H_B v - (g_B(theta + h v) - g_B(theta - h v)) / 2h || / max of the two norms,

and for a diagonal, where no product can be had, single entries against the same difference along e_i. A step may cross
a kink (ReLU) or drown in rounding, so several are tried and the best counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.problem import Problem

KIND = "central differences of gradients"
_STEPS = {torch.float64: (1e-6, 1e-7, 1e-5, 1e-8, 1e-4), torch.float32: (1e-2, 3e-3, 3e-2)}


def tolerance(dtype: torch.dtype, reference: torch.dtype) -> float:
    """The relative error up to which a block in `dtype` passes, checked by gradients in `reference`."""
    if reference != torch.float64:
        return 5e-2
    return 1e-6 if dtype == torch.float64 else 1e-3


@dataclass
class Certificate:
    """Checks blocks, and keeps the worst error of all that it saw."""

    problem: Problem
    dtype: torch.dtype
    seed: int
    directions: int = 0
    worst: float = 0.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.tolerance = tolerance(self.dtype, self.problem.dtype)

    def matrix(self, block: Block, hessian: Tensor) -> float:
        """The relative error of a block [n, n] along one random direction."""
        v = torch.randn(block.size, generator=self.generator, dtype=torch.float64)
        v = v.to(self.problem.device, self.problem.dtype)
        error = self._product_error(block, hessian, v)
        if not self.passed(error):
            fixed = self._fixed(block, hessian)
            if bool(fixed.any()):
                error = self._product_error(block, hessian, v.masked_fill(fixed, 0))
        return error

    def _product_error(self, block: Block, hessian: Tensor, v: Tensor) -> float:
        product = (hessian @ v.to(hessian.dtype)).to(self.problem.dtype)
        size = float(torch.linalg.norm(product))
        return self._best(_Along(self.problem, block, v, slice(None), product, size))

    def _fixed(self, block: Block, hessian: Tensor) -> Tensor:
        """Entries that PyTorch treats as constants though the loss depends on them (an embedding's padding row).

        They have no gradient; their rows, which the difference quotient still sees, are zero.
        """
        gradient = self.problem.gradient(block.parameters)
        flat = torch.cat([g.reshape(-1) for g in gradient.values()])
        return (flat == 0) & ~hessian.any(1)

    def diagonal(self, block: Block, diagonal: Tensor) -> float:
        """The relative error, by the largest entry, of a block's diagonal [n] at its largest and at a random entry."""
        largest = int(diagonal.abs().argmax())
        other = int(torch.randint(block.size, (), generator=self.generator))
        scale = float(diagonal[largest].abs())
        errors = []
        for index in dict.fromkeys((largest, other)):
            e = torch.zeros(block.size, dtype=self.problem.dtype, device=self.problem.device)
            e[index] = 1
            value = diagonal[index].to(self.problem.dtype)
            errors.append(self._best(_Along(self.problem, block, e, index, value, scale)))
        return max(errors)

    def passed(self, error: float) -> bool:
        return error <= self.tolerance

    def accept(self, error: float) -> None:
        self.worst = max(self.worst, error)

    def _best(self, along: _Along) -> float:
        self.directions += 1
        errors, excused = [], []
        for step in _STEPS[self.problem.dtype]:
            difference, size, rounding = along.compare(step)
            errors.append(difference / size if size else 0.0)
            if self.passed(errors[-1]):
                return errors[-1]
            excused.append(max(0.0, difference - rounding) / size)
        # No block is asked to be better than what rounding of the two gradients alone makes of the quotient.
        return min(excused) if self.passed(min(excused)) else min(errors)


@dataclass
class _Along:
    """One direction in one block: what was computed there, and its difference quotient."""

    problem: Problem
    block: Block
    direction: Tensor
    entries: slice | int
    computed: Tensor
    scale: float

    def compare(self, step: float) -> tuple[float, float, float]:
        """|computed - quotient|, the greater size of the two, and what rounding can make of the quotient."""
        step *= self._typical()
        plus, minus = self._gradient(step), self._gradient(-step)
        quotient = ((plus - minus) / (2 * step))[self.entries]
        epsilon = torch.finfo(self.problem.dtype).eps
        rounding = 8 * epsilon * float(torch.linalg.norm(plus)) / step
        difference = float(torch.linalg.norm(self.computed - quotient))
        size = max(self.scale, float(torch.linalg.norm(quotient)))
        return (difference if difference < float("inf") else float("inf")), size, rounding

    def _typical(self) -> float:
        """The size of the parameters relative to the direction's, so that a step is relative to them."""
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in self._leaves()))
        least = 1e-2 * math.sqrt(self.block.size)
        return max(size, least) / float(torch.linalg.norm(self.direction))

    def _leaves(self) -> list[Tensor]:
        return [self.problem.parameters[name] for name in self.block.parameters]

    def _gradient(self, step: float) -> Tensor:
        leaves = self._leaves()
        values = [leaf.detach().clone() for leaf in leaves]
        try:
            for leaf, part in zip(leaves, self._parts(leaves), strict=True):
                leaf.data.add_(part, alpha=step)
            grads = self.problem.gradient(self.block.parameters)
        finally:
            for leaf, value in zip(leaves, values, strict=True):
                leaf.data.copy_(value)
        return torch.cat([grad.reshape(-1) for grad in grads.values()])

    def _parts(self, leaves: Sequence[Tensor]) -> Iterator[Tensor]:
        for part, leaf in zip(self.direction.split(self.block.sizes), leaves, strict=True):
            yield part.view_as(leaf)
