"""`hesscli trace`: the trace of each tensor's block and of all, exact or estimated."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import numpy as np

from hesscli.hessian.words import FINITE_DIFFERENCE, HVP
from hesscli.job import documents
from hesscli.job.json_form import Document
from hesscli.job.matrix.planning import Plan
from hesscli.job.matrix.small import compute_blocks, groups
from hesscli.job.matrix.wrong_routes import leave_out_wrong_routes
from hesscli.job.operator import Operator, open_operator
from hesscli.job.options import ComputeOptions, Listener, ProblemOptions
from hesscli.job.setup.processes import Processes
from hesscli.spectrum.dense import DENSE
from hesscli.spectrum.finite import finite
from hesscli.spectrum.trace import Estimate, estimate

SCHEMA = "hesscli.trace/1"

_AFFORDABLE = DENSE
"""The exact diagonal is taken at once where it is planned to cost no more than this many products."""


def trace(
    problem: ProblemOptions,
    relative_error: float,
    max_products: int,
    listener: Listener,
    processes: Processes,
) -> Document:
    """The traces of a model's curvature, of blocks and of all, each with its standard error, 0 where exact.

    Args:
        relative_error: the standard error of the total, relative to it, at which an estimate is good enough.
    """
    started = time.perf_counter()
    # The other routes make no products: with them there is the exact diagonal or nothing.
    forced = problem.method not in ("auto", HVP, FINITE_DIFFERENCE)
    of_products = replace(problem, method="auto") if forced else problem
    operator = open_operator(of_products, listener, processes)
    plan = Plan(
        ComputeOptions(**vars(problem), blocks="elements", stats="basic", output=None),
        operator.opened,
    )
    if operator.method == FINITE_DIFFERENCE:
        leave_out_wrong_routes(plan)
    found = (
        _exact(plan, operator) if forced else _found(plan, operator, relative_error, max_products)
    )
    document = operator.document(SCHEMA)
    document["blocks"] = [
        facts
        | {
            "trace": float(value),
            "standard_error": float(error),
            "mean": float(value) / facts["size"] if facts["size"] else None,
        }
        for facts, value, error in zip(
            operator.parameter_facts(), found.parts, found.errors, strict=True
        )
    ]
    document["total"] = {
        "size": operator.size,
        "trace": found.total,
        "standard_error": found.error,
        "mean": found.total / operator.size,
    }
    return document | {
        "exact": not found.errors.any() and found.products == 0,
        "relative_error": relative_error,
        "products": operator.products.count,
        "converged": found.converged,
        "interrupted": found.interrupted,
        "seconds": time.perf_counter() - started,
    }


def _found(plan: Plan, operator: Operator, relative_error: float, max_products: int) -> Estimate:
    """The exact traces at once where these are affordable, or else an estimate.

    One that does not converge in as many products as the exact traces cost gives way to them, if these are allowed.
    """
    exact_products = _exact_products(plan, operator)
    if exact_products <= min(_AFFORDABLE, max_products):
        return _exact(plan, operator)
    if exact_products > max_products:
        return _estimated(operator, relative_error, max_products)
    found = _estimated(operator, relative_error, math.ceil(exact_products))
    if found.converged or found.interrupted:
        return found
    exact = _exact(plan, operator)
    return replace(found, interrupted=True) if exact.interrupted else exact


def _exact_products(plan: Plan, operator: Operator) -> float:
    """How many products the exact diagonal is planned to cost, at most as many as it has rows."""
    rows, work = plan.by_rows(operator.method), plan.work(plan.blocks)
    products = operator.size * (work / rows if rows else 1.0)
    if plan.options.method == "auto" and plan.product:
        # Rows share the calls of their passes; products are made one after the other, and each has its own.
        products = min(products, work / plan.product)
    # This process does it alone; products are shared.
    return products * operator.processes.size


def _exact(plan: Plan, operator: Operator) -> Estimate:
    """The traces of the exact diagonal."""
    operator.let_go()
    found: dict[str, Document] = {}
    try:
        for group in groups(plan):
            for facts, _ in compute_blocks(plan, group):
                found[facts["name"]] = facts
                done = sum(f["size"] for f in found.values())
                operator.opened.listener.progress(done, operator.size, "exact")
    except KeyboardInterrupt:
        names = operator.products.names
        parts = np.array([found[name]["trace"] if name in found else np.nan for name in names])
        return Estimate(parts, 0 * parts, np.nan, np.nan, 0, converged=False, interrupted=True)
    blocks = list(found.values())
    operator.check = documents.block_check_facts(plan.certificate, blocks)
    operator.method = documents.methods(blocks)
    parts = np.array([found[name]["trace"] for name in operator.products.names])
    return Estimate(parts, np.zeros(len(parts)), float(parts.sum()), 0.0, 0, converged=True)


def _estimated(operator: Operator, relative_error: float, max_products: int) -> Estimate:
    operator.needs(40, "the estimate")
    with operator.finite():
        return estimate(
            lambda v: finite(operator.products(v)),
            operator.products.sizes,
            relative_error,
            max_products,
            operator.generator(),
            operator.gradient,
            partial(report, operator.opened.listener, max_products),
        )


def report(listener: Listener, most: int, products: int, relative: float, tolerance: float) -> None:
    """How far a relative standard error has come, which falls as one over the root of the number of samples: to the
    tolerance, or to the last of `most` products.
    """
    come = min(1.0, (tolerance / relative) ** 2) if relative else 1.0
    come = max(come, products / most)
    listener.progress(int(1000 * come), 1000, f"{products} products, standard error {relative:.1%}")
