"""`hesscli eigen [HESSIAN]`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.failing import failing
from hesscli.cli.options import Debug, Json, Quiet


class Which(StrEnum):
    largest = "largest"
    smallest = "smallest"
    magnitude = "magnitude"


def eigen(
    hessian: Annotated[
        str, typer.Argument(metavar="[HESSIAN|-]", help="A Hessian file; - is standard input.")
    ] = "hessian.safetensors",
    top: Annotated[int, typer.Option("--top", min=1, help="How many eigenvalues.")] = 10,
    which: Annotated[
        Which, typer.Option(help="The largest, the smallest (most negative), or the largest by size.")
    ] = Which.largest,
    block: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of this block alone.")
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the first eigenvalues of a Hessian file, each with its block and its residual |Hv - lambda v|.

    A block-diagonal file gives those of the block-diagonal matrix. Blocks up to 4096 take LAPACK seconds each;
    larger ones go through Lanczos, read from the disk tile by tile.

    \b
    Example:
      hesscli eigen --top 10
      hesscli eigen hessian.safetensors --which smallest --block fc1.weight
      hesscli compute model.pt data.npz -o - | hesscli eigen - --json
    """
    with failing(debug):
        from hesscli.cli.output import Output
        from hesscli.job.eigen import eigen as run

        with Output(quiet=quiet, json=json) as out:
            out.eigenpairs(run(hessian, top, which.value, block, output, force))
            if output is not None:
                out.wrote(str(output), output.stat().st_size)
