"""Difference quotients for the Gauss-Newton and the empirical Fisher matrix, which no difference of gradients gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import exact_derivatives, right_gradients
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.kinks import held_difference
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem


class OutputDifference(DirectionalDifference):
    """J^T M J v in three steps that share no derivative with the products: J v by differences of the output, M
    by the loss's gradient there, J^T by a plain backward pass. The output is that of the operators' definitions, the
    backward pass that of PyTorch's own operators, so that a wrong definition shows.
    """

    def quotient(self, step: float) -> Tensor:
        return self._product(step, partial(self._central, step))

    def one_sided_quotient(self, step: float) -> Tensor:
        return self._product(step, partial(self._one_sided, step))

    def _product(
        self, step: float, differentiated: Callable[[Problem], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """J^T M J v, of what gives each batch's output and J v."""
        leaves, kept = self.leaves(), len(self.problem.batches) == 1  # see `Here.output`
        total = torch.zeros_like(self.direction)
        for problem in self.problem.by_batch():
            (batch,) = problem.batches
            f, along = differentiated(problem)
            if not f.requires_grad:
                continue
            seed = self._middle(batch, f.detach(), along, step) / self.problem.denominator
            grads = torch.autograd.grad(f, leaves, seed, retain_graph=kept, materialize_grads=True)
            total += torch.cat([g.reshape(-1) for g in grads])
        return total

    def _central(self, step: float, problem: Problem) -> tuple[Tensor, Tensor]:
        ahead, behind = self._outputs(problem, step)
        return self.here.output(problem), _where_finite(ahead, behind, 2 * step * self.scale)

    def _one_sided(self, step: float, problem: Problem) -> tuple[Tensor, Tensor]:
        (batch,) = problem.batches
        f = self.here.output(problem)
        with self.moved(step), exact_derivatives(), torch.no_grad():
            ahead = self.problem.output(batch)
        return f, _where_finite(ahead, f.detach(), step * self.scale)

    def held_quotient(self, step: float, by_original: bool = False) -> None:
        """None: `quotient` keeps the kinks already, and differences of gradients are the Hessian's."""

    def _outputs(self, problem: Problem, step: float) -> tuple[Tensor, Tensor]:
        """f(theta + step v) and f(theta - step v), where they can with every kink as it is at theta, for the result."""
        (batch,) = problem.batches
        kinks = self.here.kinks(problem)
        for mode in (kinks.held, nullcontext) if kinks.sides.noted else (nullcontext,):
            with self.moved(step), mode(), exact_derivatives():
                ahead = self.problem.output(batch).detach()
            with self.moved(-step), mode(), exact_derivatives():
                behind = self.problem.output(batch).detach()
            if not kinks.sides.lost:
                break
        return ahead, behind

    def _middle(self, batch: Batch, f: Tensor, along: Tensor, step: float) -> Tensor:
        """M u at a batch's output f, u being `along`; M is not yet divided by the denominator."""
        raise NotImplementedError

    def _slope(self, batch: Batch, f: Tensor) -> Tensor:
        """dl / df."""
        f = f.detach().requires_grad_()
        with right_gradients():
            total, _ = self.problem.loss.total(f, batch)
        return torch.autograd.grad(total, f, materialize_grads=True)[0]


def _where_finite(ahead: Tensor, behind: Tensor, h: float) -> Tensor:
    """(ahead - behind) / h; zero where one of them is infinite, as what masks a class is."""
    return ((ahead - behind) / h).where(ahead.isfinite() & behind.isfinite(), 0)


class GaussNewtonDifference(OutputDifference):
    """M is the loss's own Hessian, by differences of its gradient."""

    def _middle(self, batch: Batch, f: Tensor, along: Tensor, step: float) -> Tensor:
        size = float(torch.linalg.norm(along))
        if not size:
            return torch.zeros_like(f)
        moving = f.isfinite() & (along != 0)  # and not what masks a class, be it -inf or -1e9
        length = float(torch.linalg.norm(f.where(moving, 0)))
        t = step * max(length, 1e-2 * math.sqrt(f.numel())) / size

        def slope(t: float) -> Tensor:
            return self._slope(batch, f + t * along)

        difference = held_difference(slope, t)  # what the loss detaches, too
        return (slope(t) - slope(-t) if difference is None else difference) / (2 * t)


class FisherDifference(OutputDifference):
    """M is the outer product of each sample's gradient with itself."""

    def _middle(self, batch: Batch, f: Tensor, along: Tensor, step: float) -> Tensor:
        delta = self._slope(batch, f)
        if self.problem.one_sample or not f.dim():
            return delta * (delta * along).sum()
        terms = (delta * along).reshape(len(f), -1).sum(1)
        return delta * terms.reshape(-1, *[1] * (f.dim() - 1))
