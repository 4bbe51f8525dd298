"""The three matrices, and what makes and checks each; `operator.py` says what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hesscli.errors import MismatchError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.output_difference import FisherDifference, GaussNewtonDifference
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import OF_ALL
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import Middle, Products, gradient_outer, loss_hessian
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.base import ByRows, Route
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.hessian.routes.gauss_newton import (
    EmpiricalFisher,
    GaussNewton,
    GeneralisedGaussNewton,
)
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import LinearisedPreactivation, Preactivation
from hesscli.hessian.routes.through_weights import ThroughWeights


@dataclass(frozen=True)
class Curvature:
    """A matrix that a problem may have."""

    name: str  # of the `--curvature` option
    document_name: str  # in table, JSON and metadata
    difference: type[DirectionalDifference]  # what checks a product with it
    fast: tuple[type[AffineRoute], ...]  # routes by affine uses
    middle: Middle | None = None  # M, where the matrix is J^T M J; None for the Hessian
    by_sample: bool = False  # whether each sample must have a gradient of its own

    def require(self, analyses: Analyses) -> None:
        """Refuses a problem that has no such matrix.

        Raises:
            MismatchError: the model returns its own loss; or samples may mix, so that none has a gradient of its own.
        """
        problem, loss = analyses.problem, analyses.problem.loss
        if self.middle is not None and loss.is_output and not self._has_terms(problem):
            its = (
                "the loss takes all that the model returns"
                if loss.whole
                else "the model returns its own loss"
            )
            one = ", as one number" if self.by_sample else ""
            split = self.by_sample and loss.reduced != OF_ALL
            raise MismatchError(
                f"{its}{one}, so it has no output to take its {self.name} at",
                "--batch-size 1" if split else "--curvature hessian",
            )
        if self.by_sample and not problem.one_sample:
            try:
                for batch in problem.batches:
                    if not (problem.separable and _is_one(problem, batch)):
                        analyses.of(batch)
            except NotApplicable as reason:
                raise MismatchError(
                    f"no sample has a gradient of its own, as the empirical Fisher needs: {reason}",
                    "--batch-size 1" if problem.separable else "--curvature ggn",
                ) from None

    def _has_terms(self, problem: Problem) -> bool:
        """Whether what a problem returns is a loss of each sample, and those are enough."""
        if not self.by_sample:
            return False
        return not problem.loss.reduced or all(len(batch) == 1 for batch in problem.batches)

    def products(self, problem: Problem, memory: int = 0, rows: int | None = None) -> Products:
        """See `Products`; the problem must have this matrix."""
        self.require(Analyses(problem))
        return Products(problem, self.middle, memory, rows)

    def routes(self, cuts: Cuts, reference: Callable[[], Problem]) -> list[Route]:
        """Every route to the blocks of a problem, the fast ones first; differences are of `reference`."""
        problem, passes = cuts.problem, cuts.passes
        others: list[Route] = [ByRows(problem, passes.rows, self.middle)]
        if self.middle is None:
            rows = HessianVectorProducts(problem, passes.rows, passes.graphs)
            others = [rows, FiniteDifference(reference)]
        fast = [each for kind in self.fast for each in (kind(cuts), ThroughWeights(kind, cuts))]
        return fast + others

    def certificate(self, problem: Problem, dtype: torch.dtype, seed: int) -> Certificate:
        """See `Certificate`."""
        of = "gradients" if self.middle is None else "outputs"
        return Certificate(problem, dtype, seed, self.difference, of)


def _is_one(problem: Problem, batch: Batch) -> bool:
    """Whether a batch is one sample, whose gradient is that of the batch."""
    if len(batch) != 1:
        return False
    with torch.no_grad():
        return problem.loss.is_one_number or problem.output(batch).shape[:1] == (1,)


HESSIAN = Curvature("hessian", "hessian", DirectionalDifference, (Preactivation, GaussNewton))
GGN = Curvature(
    "ggn", "ggn", GaussNewtonDifference, (GeneralisedGaussNewton, LinearisedPreactivation),
    loss_hessian,
)  # fmt: skip
FISHER = Curvature(
    "fisher", "empirical_fisher", FisherDifference, (EmpiricalFisher,), gradient_outer,
    by_sample=True,
)  # fmt: skip
CURVATURES = {curvature.name: curvature for curvature in (HESSIAN, GGN, FISHER)}
