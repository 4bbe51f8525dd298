"""Difference quotients of plain gradients along a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.here import Here
from hesscli.hessian.differences.kinks import held_difference
from hesscli.hessian.objective.problem import Problem, parameters_moved


@dataclass
class DirectionalDifference:
    """One direction v in one block: what differences say of the block's product with it."""

    problem: Problem
    block: Block
    direction: Tensor  # [n]
    here: Here  # of the problem

    def quotient(self, step: float) -> Tensor:
        """(g_B(theta + h v) - g_B(theta - h v)) / 2h"""
        return (self.gradient(step) - self.gradient(-step)) / (2 * step * self.scale)

    def extrapolated_quotient(self, step: float) -> Tensor:
        """(4 q(h) - q(2 h)) / 3, which leaves out h^4 where q leaves out h^2: for steps so large that little is lost in
        rounding.
        """
        return (4 * self.quotient(step) - self.quotient(2 * step)) / 3

    def slope(self, step: float) -> float:
        """(L(theta + h v) - L(theta - h v)) / 2h"""
        values = []
        for h in (step, -step):
            with torch.no_grad(), self.moved(h):
                values.append(sum(float(self.problem.value(b)) for b in self.problem.batches))
        return (values[0] - values[1]) / (2 * step * self.scale)

    def one_sided_quotient(self, step: float) -> Tensor | None:
        """(g_B(theta + h v) - g_B(theta)) / h; None where there is none."""
        gradient = self.here.gradient(self.block.parameters)
        with self.here.repeats.repeating():
            return (self.gradient(step) - gradient) / (step * self.scale)

    def held_quotient(self, step: float, by_original: bool = False) -> Tensor | None:
        """The quotient of gradients that have all their kinks where they are at theta, batch by batch; `by_original`
        where they are in the pass that the block is of, rounding included. None where there is no kink, or one that
        cannot be held.
        """
        total = torch.zeros_like(self.direction)
        for problem in self.problem.by_batch():
            first = None
            if by_original and problem.original is not None:
                first = partial(_pass_of_routes, problem.original, self.block.parameters)
            difference = held_difference(replace(self, problem=problem).gradient, step, first)
            if difference is None:
                return None
            total += difference
        return total / (2 * step * self.scale)

    @cached_property
    def scale(self) -> float:
        """The size of the parameters relative to the direction's, so that a step is relative to them.

        A few that are huge, a bias of -1e9 that switches a class off, are no measure of a step of all.
        """
        sizes = torch.cat([p.detach().abs().reshape(-1) for p in self.leaves()])
        size = float(torch.linalg.norm(sizes.clamp(max=10 * sizes.median())))
        least = 1e-2 * math.sqrt(self.block.size)
        return max(size, least) / float(torch.linalg.norm(self.direction))

    def leaves(self) -> list[Tensor]:
        return [self.problem.parameters[name] for name in self.block.parameters]

    def gradient(self, step: float) -> Tensor:
        """g_B(theta + step v), the step relative to the parameters."""
        names = self.block.parameters
        return self.problem.moved_gradient(names, self.direction, step * self.scale)

    def moved(self, step: float) -> AbstractContextManager[None]:
        """The parameters at theta + step v, the step relative to them."""
        return parameters_moved(self.leaves(), self.direction, step * self.scale)


def _pass_of_routes(problem: Problem, names: Sequence[str]) -> None:
    """A gradient of one batch by the operators that blocks are made of, which round in their own way."""
    (batch,) = problem.batches
    with exact_derivatives():
        value = problem.value(batch)
    if value.requires_grad:
        leaves = [problem.parameters[name] for name in names]
        torch.autograd.grad(value, leaves, allow_unused=True)
