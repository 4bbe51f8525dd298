"""The routes by name, sharing one analysis of the problem."""

from __future__ import annotations

from collections.abc import Callable

from hesscli.hessian.cuts import Cuts
from hesscli.hessian.probes import Analyses
from hesscli.hessian.problem import Problem
from hesscli.hessian.routes.base import Route
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.hessian.routes.gauss_newton import GaussNewton
from hesscli.hessian.routes.ggn import curvature_routes
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation


def routes(
    problem: Problem, reference: Callable[[], Problem], chunk: int, curvature: str = "hessian"
) -> tuple[dict[str, Route], Analyses]:
    """Every route of a problem, by name.

    Args:
        problem: what is differentiated.
        reference: makes the same in float64, if the model runs in it; differences are taken there.
        chunk: rows per batched pass.
        curvature: "hessian", "ggn" or "fisher".
    """
    analyses = Analyses(problem)
    if curvature != "hessian":
        others = curvature_routes(problem, analyses, curvature, chunk)
        return {route.name: route for route in others}, analyses
    made: list[Route] = [
        Preactivation(problem, analyses, Cuts(problem, chunk)),
        GaussNewton(problem, analyses),
        HessianVectorProducts(problem, chunk),
        FiniteDifference(reference),
    ]
    return {route.name: route for route in made}, analyses
