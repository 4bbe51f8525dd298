"""`hesscli hvp MODEL DATA`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.commands import on_all_processes, prints, takes_problem
from hesscli.cli.numbers import number
from hesscli.cli.options import Force, Gradient, written_to
from hesscli.cli.output import Output
from hesscli.cli.summary import first_cells, products_headline, with_total
from hesscli.cli.values import finite
from hesscli.job.json_form import Document
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.processes import Processes
from hesscli.job.starting import start


@takes_problem
@prints
@on_all_processes
def hvp(
    out: Output,
    processes: Processes,
    problem: ProblemOptions,
    vector: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|gradient|random",
            help="What to multiply: a safetensors file with a tensor for each parameter, or [k, "
            "...] for k vectors.",
        ),
    ] = None,
    per_fedavg: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            callback=finite,
            help="Write (I - ALPHA H) g' instead, g' being the gradient after a step of ALPHA.",
        ),
    ] = None,
    query: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="The data of g', if it is not DATA; --samples is of both.",
            readable=False,
        ),
    ] = None,
    gradient: Gradient = False,
    output: Annotated[Path, written_to("Where to write.")] = Path("hvp.safetensors"),
    force: Force = False,
) -> None:
    """Write Hessian-vector products to safetensors, keyed and shaped as the parameters.

    \b
    Example:
      hesscli hvp model.pt data.npz --vector gradient --gradient
      hesscli hvp model.pt support.npz --per-fedavg 0.01 --query query.npz

    --per-fedavg writes the term of Per-FedAvg and MAML in one go: (I - ALPHA H(theta)) times the
    gradient at theta - ALPHA gradient(theta).
    """
    start()
    from hesscli.job.hvp import HvpOptions
    from hesscli.job.hvp import hvp as run

    options = HvpOptions(vector, per_fedavg, query, gradient, output, force)
    out.result(run(problem, options, out, processes), print_products)
    out.wrote(output)


def print_products(out: Output, document: Document) -> None:
    """Norms of what was multiplied and of what was written, by parameter."""
    facts = products_headline(document)
    if document["per_fedavg"] is not None:
        names = ["|g'|", "|(I - aH)g'|"]
        facts["term"] = f"(I - aH) g', a = {number(document['per_fedavg'])}"
        if document["query"]:
            facts["term"] += f", g' on {document['query']['path']}"
    else:
        names = ["|v|", "|Hv|"]
        values = document["rayleigh"]
        count = f"{len(values)} vectors, " if len(values) > 1 else ""
        facts["vector"] = (
            f"{count}{document['vector']}, v'Hv / v'v = "
            + ", ".join(number(value) for value in values[:5])
            + (", ..." if len(values) > 5 else "")
        )
    rows = [
        [*first_cells(part), number(part["vector_norm"]), number(part["product_norm"])]
        for part in with_total(document)
    ]
    out.facts(facts)
    out.table(["block", "shape", "size", *names], rows)
