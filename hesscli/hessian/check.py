"""The certificate: computed blocks against central differences of plain gradients.

It shares nothing with the code that made the block: the gradients are those of the original module, without any
operator replaced, in float64 where the module can run in it. For a random direction v within a block B,

    error = || H_B v - (g_B(theta + h v) - g_B(theta - h v)) / 2h || / max of the two norms,

and for a diagonal, where no product can be had, single entries against the same difference along e_i. A step may cross
a kink (ReLU) or drown in rounding, so several are tried and the best counts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.problem import Problem

KIND = "central differences of gradients"
# Relative error of a gradient next to zero. A normalisation on the way multiplies what rounding makes; in float32 that
# much would hide what is wrong.
_ROUNDING = {torch.float64: 1000 * 2**-52, torch.float32: 64 * 2**-23}
_STEPS = {torch.float64: (1e-6, 1e-7, 1e-5, 1e-8, 1e-4), torch.float32: (1e-2, 3e-3, 3e-2)}


def tolerance(dtype: torch.dtype, reference: torch.dtype) -> float:
    """The relative error up to which a block in `dtype` passes, checked by gradients in `reference`."""
    if reference != torch.float64:
        return 5e-2
    return 1e-6 if dtype == torch.float64 else 1e-3


class Matrix(Protocol):
    """What is asked of a block: a tensor [n, n], or one that is nowhere whole."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __matmul__(self, v: Tensor, /) -> Tensor: ...

    def any(self, axis: int, /) -> Tensor: ...


@dataclass
class Certificate:
    """Checks blocks."""

    problem: Problem
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self.tolerance = tolerance(self.dtype, self.problem.dtype)

    def _generator(self, block: Block) -> torch.Generator:
        """Each block has its own numbers, whichever are checked before it."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(block.name.encode()))

    def direction(self, block: Block) -> Tensor:
        """The random vector [n] that a block is compared along."""
        v = torch.randn(block.size, generator=self._generator(block), dtype=torch.float64)
        return v.to(self.problem.device, self.problem.dtype)

    def matrix(self, block: Block, hessian: Matrix) -> float:
        """The relative error of a block [n, n] along one random direction."""
        v = self.direction(block)
        error = self._product_error(block, hessian, v)
        if not self.passed(error):
            constant = self._constants(block, hessian, v)
            if bool(constant.all()):
                return 0.0
            if bool(constant.any()):
                error = self._product_error(block, hessian, v.masked_fill(constant, 0))
        return error

    def _product_error(self, block: Block, hessian: Matrix, v: Tensor) -> float:
        product = (hessian @ v.to(hessian.dtype)).to(self.problem.dtype)
        size = float(torch.linalg.norm(product))
        return self._best(_Along(self.problem, block, v, slice(None), product, size))

    def _constants(self, block: Block, hessian: Matrix, v: Tensor) -> Tensor:
        """Entries that PyTorch treats as constants though the loss depends on them: an embedding's padding row.

        They have no gradient, here or a step away, and their rows of the Hessian are zero.
        """
        along = _Along(self.problem, block, v, slice(None), v, 0.0)
        here, there = along.gradient(0.0), along.gradient(_STEPS[self.problem.dtype][-1])
        return (here == 0) & (there == 0) & ~hessian.any(1)

    def diagonal(self, block: Block, diagonal: Tensor) -> float:
        """The error of one entry of a block's diagonal [n], relative to the largest.

        It is drawn half in proportion to its size, which finds what is wrong by much, and half evenly, which finds
        what is missing.
        """
        sizes = diagonal.abs().double().cpu()
        scale = float(sizes.max())
        weights = sizes + sizes.mean() if 0 < scale < float("inf") else torch.ones_like(sizes)
        generator = self._generator(block)
        target = torch.rand((), generator=generator, dtype=torch.float64) * weights.sum()
        index = min(int(torch.searchsorted(weights.cumsum(0), target)), block.size - 1)
        e = torch.zeros(block.size, dtype=self.problem.dtype, device=self.problem.device)
        e[index] = 1
        value = diagonal[index].to(self.problem.dtype)
        return self._best(_Along(self.problem, block, e, index, value, scale))

    def passed(self, error: float) -> bool:
        return error <= self.tolerance

    def _best(self, along: _Along) -> float:
        """The least error of all steps; or, for a block lost in rounding, its share of what rounding explains.

        No block is asked to be better than the noise of the difference quotient with the largest step, where that is
        least: a bias before a normalisation has a Hessian of zero, and 1e-18 is as good.
        """
        steps = _STEPS[self.problem.dtype]
        errors: dict[float, float] = {}
        differences: dict[float, float] = {}
        for step in steps:
            differences[step], size = along.compare(step)
            errors[step] = differences[step] / size if size else 0.0
            if self.passed(errors[step]):
                return errors[step]
        largest = max(steps)
        noise = along.noise(largest, self._gradient_norm())
        if differences[largest] <= noise:
            return self.tolerance * differences[largest] / noise
        return min(errors.values())

    def _gradient_norm(self) -> float:
        gradient = self.problem.gradient(list(self.problem.parameters))
        return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


@dataclass
class _Along:
    """One direction in one block: what was computed there, and its difference quotient."""

    problem: Problem
    block: Block
    direction: Tensor
    entries: slice | int
    computed: Tensor
    scale: float

    def compare(self, step: float) -> tuple[float, float]:
        """|computed - quotient|, and the greater size of the two."""
        h = step * self._typical()
        quotient = ((self.gradient(step) - self.gradient(-step)) / (2 * h))[self.entries]
        difference = float(torch.linalg.norm(self.computed - quotient))
        size = max(self.scale, float(torch.linalg.norm(quotient)))
        return (difference if difference < float("inf") else float("inf")), size

    def noise(self, step: float, gradient_norm: float) -> float:
        """What rounding of the gradients can make of the quotient."""
        return _ROUNDING[self.problem.dtype] * gradient_norm / (step * self._typical())

    def _typical(self) -> float:
        """The size of the parameters relative to the direction's, so that a step is relative to them."""
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in self._leaves()))
        least = 1e-2 * math.sqrt(self.block.size)
        return max(size, least) / float(torch.linalg.norm(self.direction))

    def _leaves(self) -> list[Tensor]:
        return [self.problem.parameters[name] for name in self.block.parameters]

    def gradient(self, step: float) -> Tensor:
        """g_B(theta + step v), the step relative to the parameters."""
        step *= self._typical()
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
