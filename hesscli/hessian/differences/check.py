"""The certificate: computed blocks against differences of plain gradients.

It shares nothing with the code that made the block, unless `finite-difference` did: the gradients are those of the
original module, without any operator replaced but where PyTorch's own gradient is wrong, in float64 where the module
can run in it. For a random direction v within a block B,

    error = || H_B v - (g_B(theta + h v) - g_B(theta - h v)) / 2h || / max of the two norms,

and for a diagonal, where no product can be had, two entries against the same difference along a e_i + e_j, or else
single ones along e_i. A step may cross a kink (ReLU) or drown in rounding, so several are tried and the best counts;
some of them keep every kink on the side where it is at theta (see `kinks.py`). Of millions of units float32 rounds a
few across their corner, which a product that sums up to little shows in its third digit: kinks are also held where the
pass has them that the block is of.

Blocks by `finite-difference` are made of the same gradients. The check takes them elsewhere, along v where these went
along e_i, and with other steps, so it finds a wrong step or a wrong place, and a gradient that is no function's.

A block in float32 is held to less than what a difference from one side, (g_B(theta + h v) - g_B(theta)) / h, leaves
out; so that comes first: all blocks share what is at theta, and a small step seldom meets a kink.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.digits import gradient_digits
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.here import Here
from hesscli.hessian.objective.problem import Problem

# Relative error of a gradient next to zero. A normalisation on the way multiplies what rounding makes; in float32 that
# much would hide what is wrong.
_ROUNDING = {torch.float64: 1000 * 2**-52, torch.float32: 64 * 2**-23}
# The last is the largest.
_STEPS = {torch.float64: (1e-6, 1e-7, 1e-5, 1e-8, 1e-4), torch.float32: (1e-2, 3e-3, 3e-2)}
_HELD = {torch.float64: (1e-5, 1e-4, 1e-6), torch.float32: (1e-2, 3e-2)}  # with kinks held
_EXTRAPOLATED = {
    torch.float64: (3e-3,),
    torch.float32: (),
}  # for gradients of terms that nearly cancel
_NOTED = 6  # batches: each has an eighth of the memory that activations may take, at most
SINGLE = 1e-3
"""The relative error with which what is computed in float32 passes."""
_ONE_SIDED = 1e-8  # leaves out about as much: far below the tolerance of float32, not of float64


def one_sided(dtype: torch.dtype, reference: torch.dtype) -> bool:
    """Whether a difference from one side is tried first."""
    return dtype == torch.float32 and reference == torch.float64


def gradients(blocks: int, dtype: torch.dtype, reference: torch.dtype) -> int:
    """How many gradients the check of so many blocks takes, where the first step will do."""
    return blocks + 1 if one_sided(dtype, reference) else 2 * blocks


Multiply = Callable[[Tensor], Tensor]  # v [n] -> H v [n]
Try = tuple[float, Callable[[float], Tensor | None]]  # a step, and the quotient with it


class ProductError(NamedTuple):
    """How far a product is from differences, and products from symmetry, both relative."""

    difference: float
    asymmetry: float


@dataclass
class Certificate:
    """Tells whether blocks of the Hessian, or products with them, agree with differences of gradients."""

    # The reference, whose gradients these are: in float64 where the model runs in it.
    problem: Problem
    # Of the blocks; it and the digits of the gradients say how well they must agree.
    dtype: torch.dtype
    seed: int  # of the random directions
    # Says what a product along a direction is, by differences.
    difference: Callable[..., DirectionalDifference] = DirectionalDifference
    of: str = "gradients"  # what these are of, "gradients" or "outputs"

    def __post_init__(self) -> None:
        self.tolerance = 1e-6 if self.dtype == torch.float64 else SINGLE
        self.digits = gradient_digits(self.problem)
        if self.digits != torch.float64:
            self.tolerance = 5e-2
        self.kind = f"differences of {self.of}"
        self.one_sided = one_sided(self.dtype, self.digits)
        self.here = Here(self.problem)

    @cached_property
    def gradient_norm(self) -> float:
        """|g(theta)| over all parameters of the module: what rounding goes by, whichever were chosen.

        Where that is nothing but rounding, of a loss that normalisations keep constant, |L| / |theta| instead.
        """
        norm = self.problem.gradient_norm()
        with torch.no_grad():
            value = sum(float(self.problem.value(batch)) for batch in self.problem.batches)
        leaves = [p.detach() for p in self.problem.parameters.values()]
        size = math.hypot(*(float(p.norm()) for p in leaves))
        least = 1e-2 * math.sqrt(sum(p.numel() for p in leaves))  # as of a step
        usual = abs(value) / max(size, least)
        return usual if norm <= _ROUNDING[self.digits] * usual else norm

    def finds_another_slope(self, block: Block) -> bool:
        """Whether the loss has another slope than its gradient by the block says: over a step and over its half."""
        if not self.problem.runs_here:
            return False
        v, step = self.direction(block), _STEPS[self.digits][-1]
        along = DirectionalDifference(self.problem, block, v, self.here)
        expected, slope = float(along.gradient(0.0) @ v), along.slope(step)
        gap, size = abs(slope - expected), max(abs(slope), abs(expected))
        return gap > SINGLE * size and abs(slope - along.slope(step / 2)) < 1e-2 * gap

    def _generator(self, block: Block) -> torch.Generator:
        """Each block has its own numbers, whichever are checked before it."""
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(block.name.encode()))

    def direction(self, block: Block) -> Tensor:
        """The random vector [n] that a block is compared along."""
        v = torch.randn(block.size, generator=self._generator(block), dtype=torch.float64)
        return v.to(self.problem.device, self.problem.dtype)

    def matrix(self, block: Block, hessian: Tensor) -> float:
        """The relative error of a block [n, n] along one random direction."""
        return self.symmetric(block, lambda v: hessian @ v.to(hessian.dtype))

    def symmetric(self, block: Block, multiply: Multiply) -> float:
        """The same of a block that is known by its products v [n] -> H v [n], and symmetric."""
        error, _, _ = self._along_direction(block, multiply)
        return error

    def product(self, block: Block, multiply: Multiply) -> ProductError:
        """The same of a block that may not be, and how asymmetric its products are."""
        error, v, product = self._along_direction(block, multiply)
        if not self.passed(error):
            return ProductError(error, 0.0)
        return ProductError(error, self._asymmetry(block, multiply, v, product))

    def asymmetry(self, block: Block, multiply: Multiply) -> float:
        """How asymmetric products are that are differences of gradients themselves, as these here."""
        v = self.direction(block)
        return self._asymmetry(block, multiply, v, multiply(v).to(v.dtype))

    def _along_direction(self, block: Block, multiply: Multiply) -> tuple[float, Tensor, Tensor]:
        """The relative error of a product, the direction v, and the product."""
        v = self.direction(block)
        product = multiply(v).to(self.problem.dtype)
        error = self._product_error(block, product, v)
        if not self.passed(error):
            constant = self._constants(block, product, v)
            if bool(constant.all()):
                return 0.0, v, product
            if bool(constant.any()):
                v = v.masked_fill(constant, 0)
                product = multiply(v).to(self.problem.dtype)
                error = self._product_error(block, product, v)
        return error, v, product

    def _product_error(self, block: Block, product: Tensor, v: Tensor) -> float:
        size = float(torch.linalg.norm(product))
        if not size < math.inf:
            return math.inf
        return self._best(self.along(block, v), slice(None), product, size)

    def along(self, block: Block, v: Tensor) -> DirectionalDifference:
        return self.difference(self.problem, block, v, self.here)

    def _constants(self, block: Block, product: Tensor, v: Tensor) -> Tensor:
        """Entries that PyTorch treats as constants though the loss depends on them: an embedding's padding row.

        They have no gradient, here or a step away, and their rows of the Hessian are zero.
        """
        along = DirectionalDifference(self.problem, block, v, self.here)
        here, there = along.gradient(0.0), along.gradient(_STEPS[self.digits][-1])
        return (here == 0) & (there == 0) & (product == 0)

    def diagonal(self, block: Block, diagonal: Tensor) -> float:
        """The error of entries of a block's diagonal [n], relative to the largest.

        The largest is compared, which finds what is wrong by much, and one of the others, which finds what is missing:
        along one direction, if that will do, or else along one each.
        """
        self.here.noted = _NOTED  # where all blocks are small
        sizes = diagonal.abs()
        largest = int(sizes.argmax())
        scale, compared = float(sizes[largest]), [largest]
        if block.size > 1:
            generator = self._generator(block)
            drawn = int(torch.randint(block.size - 1, (), generator=generator))
            compared.append(drawn + (drawn >= largest))
            factor = 1.5 + 0.5 * float(torch.rand((), generator=generator))
            error = self._pair_error(block, diagonal, compared, factor, scale)
            if self.passed(error):
                return error
        return max(self._entry_error(block, diagonal, index, scale) for index in compared)

    def _pair_error(
        self, block: Block, diagonal: Tensor, pair: list[int], a: float, scale: float
    ) -> float:
        """The error of two entries along v = a e_i + e_j, by the first step.

        H v is a H_ii + H_ij at i, and a H_ij + H_jj at j. So a (H v)_i - (H v)_j has nothing from off the diagonal. In
        a^2 H_ii - H_jj neither entry's error counts for less than alone, nor does that of a factor that both have, or
        of a number that both are off, for a^2 > 2. Errors that make up for each other are a^2 apart, and a is drawn.
        """
        v = torch.zeros(block.size, dtype=self.problem.dtype, device=self.problem.device)
        v[pair] = v.new_tensor([a, 1])
        along = self.along(block, v)
        quotient = along.one_sided_quotient(_ONE_SIDED) if self.one_sided else None
        if quotient is None:
            quotient = along.quotient(_STEPS[self.digits][0])
        wrong = quotient[pair] - v[pair] * diagonal[pair].to(self.problem.dtype)
        difference = abs(float(a * wrong[0] - wrong[1]))
        if not difference:
            return 0.0
        return difference / scale if scale else math.inf

    def _entry_error(self, block: Block, diagonal: Tensor, index: int, scale: float) -> float:
        e = torch.zeros(block.size, dtype=self.problem.dtype, device=self.problem.device)
        e[index] = 1
        value = diagonal[index].to(self.problem.dtype)
        return self._best(self.along(block, e), index, value, scale)

    def _asymmetry(self, block: Block, multiply: Multiply, v: Tensor, along_v: Tensor) -> float:
        """|<u, H v> - <v, H u>| over the greater of |H u| and |H v|, for another random u.

        What PyTorch says is a gradient may be that of no function: where a kernel's backward pass is wrong, or a score
        is lost in a mask, or a hook solves for what moves with the parameters. Differences of it agree all the same. Of
        a block that is zero but for rounding it is, as in `_best`, its share of what rounding explains.
        """
        vectors = torch.randn(2, block.size, generator=self._generator(block), dtype=torch.float64)
        u = vectors[1].to(v).masked_fill(v == 0, 0)
        along_u = multiply(u).to(v.dtype)
        size = max(float(torch.linalg.norm(along_u)), float(torch.linalg.norm(along_v)))
        difference = abs(float(u @ along_v - v @ along_u))
        if difference <= self.tolerance * size:
            return difference / size if size else 0.0
        if not difference < math.inf:
            return math.inf
        scale = self.along(block, v).scale
        noise = self._rounding(scale * _STEPS[self.digits][-1]) + self._of_block(scale)
        return difference / size if difference > noise else self.tolerance * difference / noise

    def _rounding(self, step: float) -> float:
        """What rounding makes of a difference quotient of gradients with this step."""
        return _ROUNDING[self.digits] * self.gradient_norm / step

    def _of_block(self, scale: float) -> float:
        """What rounding makes of a block that would be zero without; `scale` is what steps are relative to."""
        return _ROUNDING[self.dtype] * self.gradient_norm / scale

    def passed(self, error: float) -> bool:
        return error <= self.tolerance

    def _best(
        self, along: DirectionalDifference, entries: slice | int, computed: Tensor, scale: float
    ) -> float:
        """The least error of all steps; or, for a block lost in rounding, its share of what rounding explains.

        It is |computed - quotient| of these entries, over the greater of |quotient| and `scale`.

        No block is asked to be better than the noise of the difference quotient with the largest step, where that is
        least: a bias before a normalisation has a Hessian of zero, and 1e-18 is as good.
        """

        def distance(quotient: Tensor | None) -> tuple[float, float]:
            if quotient is None:
                return math.inf, 1.0
            difference = float(torch.linalg.norm(computed - quotient[entries]))
            size = max(scale, float(torch.linalg.norm(quotient[entries])))
            return (difference if difference < math.inf else math.inf), size

        if self.one_sided:
            difference, size = distance(along.one_sided_quotient(_ONE_SIDED))
            if difference <= self.tolerance * size:
                return difference / size if size else 0.0
        largest, errors = _STEPS[self.digits][-1], list[float]()
        for tries in self._rounds(along):
            least = math.inf  # difference with the largest step
            for step, quotient in tries:
                difference, size = distance(quotient(step))
                errors.append(difference / size if size else 0.0)
                if self.passed(errors[-1]):
                    return errors[-1]
                if step == largest:
                    least = min(least, difference)
            noise = self._noise(along, entries, largest, least)
            if least <= noise:
                return self.tolerance * least / noise
        return min(errors)

    def _rounds(self, along: DirectionalDifference) -> list[list[Try]]:
        """The quotients that are tried, one after the other; the second round where the first settles nothing."""
        dtype = self.digits
        first, *others, largest = [(h, along.quotient) for h in _STEPS[dtype]]
        held = [(h, along.held_quotient) for h in _HELD[dtype]]
        by_original = partial(along.held_quotient, by_original=True)
        of_original = [(h, by_original) for h in _HELD[dtype] if self.problem.original is not None]
        extrapolated = [(h, along.extrapolated_quotient) for h in _EXTRAPOLATED[dtype]]
        return [
            [*of_original[:1], first, largest],
            [*of_original[1:], *held, *others, *extrapolated],
        ]

    def _noise(
        self, along: DirectionalDifference, entries: slice | int, step: float, difference: float
    ) -> float:
        """How much of a difference rounding in the quotient explains; and in the block, where that is only noise."""
        noise = self._rounding(step * along.scale)
        of_block = self._of_block(along.scale)
        if self.dtype == self.digits or difference > noise + of_block:
            return noise  # two more gradients would not change the verdict
        quotient = along.quotient(step)[entries]
        return noise if float(torch.linalg.norm(quotient)) > noise else noise + of_block
