"""`hesscli eigen [HESSIAN]`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hesscli.cli.completion import block_names
from hesscli.cli.failing import failing
from hesscli.cli.gates import FailAbove, FailBelow, end_seen, gate_eigenvalues
from hesscli.cli.options import Debug, Json, Quiet

if TYPE_CHECKING:
    from hesscli.cli.output import Document, Output


class Which(StrEnum):
    largest = "largest"
    smallest = "smallest"
    magnitude = "magnitude"


def eigen(
    hessian: Annotated[
        str, typer.Argument(metavar="HESSIAN|-", help="A Hessian file; - is standard input.")
    ] = "hessian.safetensors",
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=1, help="How many eigenvalues.")
    ] = 10,
    which: Annotated[
        Which,
        typer.Option(help="largest, smallest (most negative), or largest in magnitude first."),
    ] = Which.largest,
    block: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=block_names, help="Of this block alone."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write eigenvalues [k] and eigenvectors [k, n] to safetensors.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a file that hesscli did not write.")
    ] = False,
    fail_above: FailAbove = None,
    fail_below: FailBelow = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the first eigenvalues of a Hessian file, with block and residual |Hv - lambda v|.

    \b
    Example:
      hesscli eigen --top 10
      hesscli eigen hessian.safetensors --which smallest --block fc1.weight
      hesscli eigen --top 1 --fail-above 10
      hesscli compute model.pt data.npz -o - | hesscli eigen - --json

    A file of blocks gives those of the block-diagonal matrix, a file of elements those of the
    diagonal one. A block of up to 4096 rows takes LAPACK seconds; a larger one goes through
    Lanczos, which reads it from the disk again and again.
    """
    with failing(debug):
        from hesscli.cli.output import Output
        from hesscli.job.eigen import eigen as run

        end_seen(which.value, fail_above, fail_below)
        with Output(quiet=quiet, json=json) as out:
            document = run(hessian, top, which.value, block, output, force)
            print_eigenpairs(out, document)
            if output is not None:
                out.wrote(str(output), output.stat().st_size)
        gate_eigenvalues(document, fail_above, fail_below)


def print_eigenpairs(out: Output, document: Document) -> None:
    """The first eigenvalues of a Hessian."""
    from hesscli.cli.output import error

    if not out.wants_text(document):
        return
    values = zip(document["eigenvalues"], document["residuals"], document["blocks"], strict=True)
    rows = [
        [str(index), f"{value:.6g}", error(residual), block]
        for index, (value, residual, block) in enumerate(values, 1)
    ]
    source = "standard input" if document["hessian"] == "-" else document["hessian"]
    part = f"block {document['block']}" if document["block"] else document["structure"]
    order = {"magnitude": "largest in magnitude"}.get(document["which"], document["which"])
    matrix = f"{part}, {document['size']} x {document['size']}"
    out.facts({"hessian": f"{source} ({matrix})", "order": f"{order} first"})
    out.table(["#", "eigenvalue", "residual", "block"], rows, words=(3,))
