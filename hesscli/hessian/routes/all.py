"""The routes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hesscli.hessian.analysis import Analyses
from hesscli.hessian.cuts import Cuts
from hesscli.hessian.problem import Problem
from hesscli.hessian.routes.base import Route
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.hessian.routes.gauss_newton import GaussNewton
from hesscli.hessian.routes.ggn import curvature_routes
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation


def routes(
    problem: Problem,
    analyses: Analyses,
    cuts: Cuts,
    reference: Callable[[], Problem],
    curvature: str = "hessian",
) -> dict[str, Route]:
    """Every route of a problem, by name.

    Args:
        problem: what is differentiated.
        analyses: of its batches.
        cuts: of its batches.
        reference: makes the same in float64, if the model runs in it; differences are taken there.
        curvature: "hessian", "ggn" or "fisher".
    """
    made: Sequence[Route] = (
        [
            Preactivation(problem, analyses, cuts),
            GaussNewton(problem, analyses),
            HessianVectorProducts(problem, cuts.chunk),
            FiniteDifference(reference),
        ]
        if curvature == "hessian"
        else curvature_routes(problem, analyses, curvature, cuts.chunk)
    )
    return {route.name: route for route in made}
