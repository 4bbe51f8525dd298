"""The certificate of the Gauss-Newton and the empirical Fisher matrix, which no difference of gradients gives."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.batch import Batch
from hesscli.hessian.blocks import Block
from hesscli.hessian.check import Certificate
from hesscli.hessian.definitions import exact_derivatives, right_gradients
from hesscli.hessian.directional import DirectionalDifference
from hesscli.hessian.kinks import Kinks, held_difference
from hesscli.hessian.problem import Problem


def certificate_of(problem: Problem, dtype: torch.dtype, seed: int, curvature: str) -> Certificate:
    """What checks a curvature: "hessian", "ggn" or "fisher"."""
    if curvature == "hessian":
        return Certificate(problem, dtype, seed)
    return OutputCertificate(problem, dtype, seed, curvature == "fisher")


@dataclass
class OutputCertificate(Certificate):
    """Checks J^T M J by differences of the model's output, and, for Gauss-Newton, of the loss's gradient there."""

    fisher: bool

    kind = "differences of outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_sided = False

    def along(self, block: Block, v: Tensor) -> DirectionalDifference:
        return OutputDifference(self.problem, block, v, self.fisher)


@dataclass
class OutputDifference(DirectionalDifference):
    """J^T M J v in three steps that share nothing with the products: J v by central differences of the output,
    M by differences of the loss's gradient there (or, for Fisher, from that gradient), J^T by a plain backward pass.
    """

    fisher: bool

    def quotient(self, step: float) -> Tensor:
        leaves, h = self.leaves(), step * self.scale
        total = torch.zeros_like(self.direction)
        for problem in self.problem.by_batch():
            (batch,) = problem.batches
            ahead, behind = self._outputs(problem, step)
            along = ((ahead - behind) / (2 * h)).where(ahead.isfinite() & behind.isfinite(), 0)
            f = self.problem.output(batch)
            if not f.requires_grad:
                continue
            seed = self._middle(batch, f.detach(), along, step) / self.problem.denominator
            grads = torch.autograd.grad(f, leaves, seed, allow_unused=True)
            total += torch.cat(
                [
                    (torch.zeros_like(leaf) if g is None else g).reshape(-1)
                    for g, leaf in zip(grads, leaves, strict=True)
                ]
            )
        return total

    def held_quotient(self, step: float, narrow: bool = False) -> None:
        """None: `quotient` keeps the kinks already, and differences of gradients are the Hessian's."""

    def _outputs(self, problem: Problem, step: float) -> tuple[Tensor, Tensor]:
        """f(theta + step v) and f(theta - step v), where they can with every kink as it is at theta, for the result."""
        (batch,) = problem.batches
        at = problem.narrow or problem
        kinks = Kinks()
        with kinks, exact_derivatives():
            at.output(at.batches[0])
        for mode in (kinks.held, nullcontext):
            with self.moved(step), mode():
                ahead = self.problem.output(batch).detach()
            with self.moved(-step), mode():
                behind = self.problem.output(batch).detach()
            if not kinks.lost:
                break
        return ahead, behind

    def _middle(self, batch: Batch, f: Tensor, along: Tensor, step: float) -> Tensor:
        if self.fisher:
            delta = self._slope(batch, f)
            terms = (delta * along).reshape(len(f), -1).sum(1)
            return delta * terms.reshape(-1, *[1] * (f.dim() - 1))
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

    def _slope(self, batch: Batch, f: Tensor) -> Tensor:
        """dl / df."""
        f = f.detach().requires_grad_()
        with right_gradients():
            total, _ = self.problem.loss.total(f, batch.target, batch.loss_arguments)
        return torch.autograd.grad(total, f)[0] if total.requires_grad else torch.zeros_like(f)
