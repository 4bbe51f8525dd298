"""`hesscli eigen [HESSIAN | MODEL DATA]`."""

from __future__ import annotations

import glob
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hesscli.cli.commands import on_all_processes, prints, takes_hessian_or_problem
from hesscli.cli.completion import block_names
from hesscli.cli.gates import bound, gate, refuse_unseen_end
from hesscli.cli.numbers import error
from hesscli.cli.options import Force, refuse_idle_force, written_to
from hesscli.cli.output import Output
from hesscli.cli.summary import shape_text, spectrum_headline
from hesscli.cli.values import finite
from hesscli.errors import NumericalError, UsageError
from hesscli.job.json_form import Document
from hesscli.job.options import ProblemOptions, Which
from hesscli.job.setup.processes import Processes
from hesscli.job.sizes import counted
from hesscli.job.starting import start

if TYPE_CHECKING:
    from hesscli.job.eigen import EigenOptions

_TOP = 10
_USUAL = 30  # products for each eigenvalue, where they are neither crowded nor tiny


@takes_hessian_or_problem("per_block", "tol", "max_products")
@prints
@on_all_processes
def eigen(
    out: Output,
    processes: Processes,
    hessian: str | ProblemOptions,
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=1, help="How many eigenvalues.")
    ] = _TOP,
    which: Annotated[
        Which,
        typer.Option(
            help="largest, smallest (most negative), or largest in magnitude first; both: half of "
            "them from each end."
        ),
    ] = "largest",
    block: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=block_names,
            help="Of this block of a Hessian file alone.",
        ),
    ] = None,
    per_block: Annotated[
        bool,
        typer.Option(
            "--per-block", help="Of a model: the extremes of each parameter's own block instead."
        ),
    ] = False,
    tol: Annotated[
        float,
        typer.Option(
            metavar="T",
            min=0,
            callback=finite,
            help="Of a model: stop when |Hv - lambda v| <= T |lambda|; 0: as small as rounding leaves it.",
        ),
    ] = 1e-3,
    max_products: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Of a model: give up after so many; each is 1.4 gradients."
        ),
    ] = 1000,
    output: Annotated[
        Path | None, written_to("Write eigenvalues [k] and eigenvectors [k, n] to safetensors.")
    ] = None,
    force: Force = False,
    fail_above: Annotated[
        float | None, bound("Exit 1 if the largest eigenvalue is above X.")
    ] = None,
    fail_below: Annotated[
        float | None, bound("Exit 1 if the smallest eigenvalue is below X.")
    ] = None,
) -> None:
    """Print the first eigenvalues of a Hessian file, or of a model without its Hessian.

    \b
    Example:
      hesscli eigen --top 10
      hesscli eigen hessian.safetensors --which smallest --block fc1.weight
      hesscli eigen model.pt data.npz --top 10 --curvature ggn
      hesscli eigen --top 1 --fail-above 10
      hesscli compute model.pt data.npz -o - | hesscli eigen - --json

    A file of blocks gives those of the block-diagonal matrix, a file of elements those of the
    diagonal one. A block of up to 4096 rows takes LAPACK seconds; a larger one goes through
    Lanczos, which reads it from the disk again and again.

    MODEL DATA gives those of the whole matrix, which is never formed: by Lanczos, with about three
    vectors of memory for each eigenvalue. An eigenvalue comes out as often as it occurs.
    """
    if per_block and (top, which) != (_TOP, "largest"):
        raise UsageError(
            "--per-block gives the largest and the smallest of each block, and takes no --top or --which",
            "hesscli eigen --help",
        )
    refuse_idle_force(force, "-o eigen.safetensors", output)
    ends, count = ("both", 2) if per_block else (which, top)
    refuse_unseen_end(ends, count, fail_above, fail_below)
    if not isinstance(hessian, str):
        if block is not None:
            raise UsageError(
                "--block goes with a Hessian file",
                f"--params {shlex.quote(glob.escape(block))}",
                instead_of=("--block",),
            )
        start()
    from hesscli.job.eigen import EigenOptions
    from hesscli.job.eigen import eigen as run

    options = EigenOptions(top, which, tol, max_products, per_block, block, output, force)
    if isinstance(hessian, str):
        document = run(hessian, options)
        out.result(document, print_eigenpairs)
    else:
        document = of_model(out, hessian, options, processes)
    if output is not None:
        out.wrote(output)
    pairs = zip(document["blocks"], document["eigenvalues"], strict=True)
    gate([(f"an eigenvalue of {name}", value) for name, value in pairs], fail_above, fail_below)


def of_model(
    out: Output, problem: ProblemOptions, options: EigenOptions, processes: Processes
) -> Document:
    """Runs and prints; then fails where it must."""
    from hesscli.job.model_eigen import model_eigen, reached

    document = model_eigen(problem, options, out, processes)
    out.result(document, print_extremes if options.per_block else print_eigenpairs)
    if document["interrupted"]:
        raise KeyboardInterrupt
    if not (document["converged"] or document["spent"]):
        raise NumericalError(
            f"not converged: rounding in {document['dtype']} keeps residuals above the tolerance",
            "--dtype float64" if document["dtype"] == "float32" else f"--tol {reached(document)}",
        )
    if not document["converged"]:
        raise NumericalError(
            f"not converged after {counted(options.max_products, 'product')}: see the residuals",
            f"--max-products {max(4 * options.max_products, _USUAL * options.top)}",
        )
    return document


def print_eigenpairs(out: Output, document: Document) -> None:
    """The first eigenvalues of a Hessian."""
    values = zip(document["eigenvalues"], document["residuals"], document["blocks"], strict=True)
    rows = [
        [str(index), f"{value:.6g}", error(residual), block]
        for index, (value, residual, block) in enumerate(values, 1)
    ]
    order = {
        "magnitude": "largest in magnitude first",
        "both": "half from each end, largest first",
    }.get(document["which"], f"{document['which']} first")
    out.facts(spectrum_headline(document) | {"order": order})
    if "model" in document:
        out.table(["#", "eigenvalue", "residual"], [row[:3] for row in rows], words=(0,))
    else:
        out.table(["#", "eigenvalue", "residual", "block"], rows, words=(3,))


def print_extremes(out: Output, document: Document) -> None:
    """The largest and smallest eigenvalue of each parameter's own block."""
    shapes = {facts["name"]: facts["shape"] for facts in document["parameters"]}
    found: dict[str, list[tuple[float, float]]] = {}
    parts = zip(document["blocks"], document["eigenvalues"], document["residuals"], strict=True)
    for block, value, residual in parts:
        found.setdefault(block, []).append((value, residual))
    rows = [
        [
            block,
            shape_text(shapes[block]),
            f"{max(pairs)[0]:.6g}",
            f"{min(pairs)[0]:.6g}",
            error(max(residual for _, residual in pairs)),
        ]
        for block, pairs in found.items()
    ]
    out.facts(spectrum_headline(document))
    out.table(["block", "shape", "eig_max", "eig_min", "residual"], rows)
