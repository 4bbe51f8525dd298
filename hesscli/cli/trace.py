"""`hesscli trace MODEL DATA`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from hesscli.cli.commands import on_all_processes, prints, takes_problem
from hesscli.cli.gates import bound, gate
from hesscli.cli.numbers import number
from hesscli.cli.output import Output
from hesscli.cli.summary import first_cells, products_headline, with_total
from hesscli.cli.values import finite
from hesscli.errors import NumericalError
from hesscli.job.json_form import Document
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.processes import Processes
from hesscli.job.starting import start


@takes_problem
@prints
@on_all_processes
def trace(
    out: Output,
    processes: Processes,
    problem: ProblemOptions,
    rel_error: Annotated[
        float,
        typer.Option(
            metavar="E",
            min=0,
            callback=finite,
            help="Stop an estimate when its standard error is E of the total.",
        ),
    ] = 0.01,
    max_products: Annotated[
        int, typer.Option(metavar="N", min=2, help="Or after so many; each is 1.4 gradients.")
    ] = 1000,
    fail_above: Annotated[
        float | None, bound("Exit 1 if the trace of the whole is above X.")
    ] = None,
) -> None:
    """Print the trace of the Hessian, of each tensor's own block and in all.

    \b
    Example:
      hesscli trace model.pt data.npz
      hesscli trace model.pt data.npz --curvature ggn --rel-error 0.001
      hesscli trace model.pt data.npz --fail-above 100

    Exact, through the diagonal, where that is affordable; elsewhere estimated from products with
    random vectors, and printed with its standard error. The mean, trace / size, is the sensitivity
    that HAWQ-V2 quantizes by.
    """
    start()
    from hesscli.job.trace import trace as run

    document = run(problem, rel_error, max_products, out, processes)
    if not (document["converged"] or document["interrupted"]):
        total = document["total"]
        reached = total["standard_error"] / abs(total["trace"]) if total["trace"] else math.inf
        out.note(
            f"the standard error is {reached:.2g} of the total after {max_products} products; "
            f"--max-products {4 * max_products} would halve it"
        )
    out.result(document, print_traces)
    if document["interrupted"]:
        raise KeyboardInterrupt
    if fail_above is not None and not document["converged"]:
        raise NumericalError(
            "not converged: the estimate is too rough for --fail-above",
            f"--max-products {4 * max_products}",
        )
    gate([("the trace", document["total"]["trace"])], fail_above)


def print_traces(out: Output, document: Document) -> None:
    """One row per tensor, and the total."""
    rows = [
        [
            *first_cells(facts),
            f"{facts['trace']:.4g}" if math.isfinite(facts["trace"]) else "-",
            _error(facts["standard_error"]),
            number(facts["mean"]),
        ]
        for facts in with_total(document)
    ]
    out.facts(products_headline(document))
    out.table(["block", "shape", "size", "trace", "error", "mean"], rows)


def _error(standard_error: float) -> str:
    if standard_error == 0:
        return "exact"
    return f"+- {standard_error:.3g}" if math.isfinite(standard_error) else "-"
