"""`hesscli compute MODEL DATA`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hesscli.cli.commands import prints, takes_problem
from hesscli.cli.gates import bound, gate
from hesscli.cli.options import Gradient, written_to
from hesscli.cli.output import Output
from hesscli.cli.summary import print_hessian, print_plan
from hesscli.cli.values import byte_count, shard_place
from hesscli.errors import UsageError
from hesscli.job.options import Blocks, ComputeOptions, ProblemOptions, Stats
from hesscli.job.setup.team import rank
from hesscli.job.starting import start


@takes_problem
@prints
def compute(
    out: Output,
    problem: ProblemOptions,
    blocks: Annotated[
        Blocks,
        typer.Option(
            "--blocks",
            "-b",
            help="diag: block_diagonal, one block per parameter tensor. module: one per module. "
            "full: the whole matrix, P x P numbers. elements: the diagonal's entries alone.",
        ),
    ] = "diag",
    output: Annotated[
        str, written_to("Where to write; - is standard output.", metavar="FILE|-")
    ] = "hessian.safetensors",
    gradient: Gradient = False,
    stats: Annotated[
        Stats,
        typer.Option(
            help="basic: trace and norm. auto: also the extreme eigenvalues of blocks up to 1536. "
            "all: of every block; for large ones longer than the Hessian takes. none: nothing."
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it would take; compute and write nothing."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace a file that hesscli did not write; throw away what an interrupted run left.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Write several files of at most SIZE, such as 5GB, with an index, as Hugging Face does. "
            "A tensor is never cut: one that is larger has a file of its own.",
            show_default="one file",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="How much to use, such as 4GiB. A block that does not fit is written band by band.",
            show_default="60 % of what is free",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Compute only the I-th of N shares of the work, from 1; hesscli merge joins them.",
        ),
    ] = None,
    fail_above: Annotated[
        float | None,
        bound("Exit 1 if the largest eigenvalue of any block is above X; implies --stats all."),
    ] = None,
) -> None:
    """Write the Hessian of a saved model's loss to safetensors, and print a summary table.

    \b
    Example:
      hesscli compute model.pt data.npz --blocks diag
      hesscli compute net.safetensors data.npz --arch nets.py:Net --blocks full
      hesscli compute model.pt data.npz -o - | hesscli eigen - --top 10
    """
    if output == "-" and not dry_run:
        out.leave_stdout()
    if fail_above is not None and stats in ("basic", "none"):
        raise UsageError(
            f"--fail-above needs eigenvalues, and --stats {stats} computes none", "--stats all"
        )
    if fail_above is not None and shard is not None:
        raise UsageError("--fail-above needs the whole Hessian, and a shard is a part of it")
    options = ComputeOptions(
        **vars(problem),
        blocks=blocks,
        gradient=gradient,
        stats=stats if fail_above is None else "all",
        output=None if output == "-" else Path(output),
        force=force,
        max_shard_size=byte_count(max_shard_size, "--max-shard-size"),
        memory=byte_count(memory, "--memory"),
        resume=resume,
        shard=shard_place(shard),
    )
    start()
    from hesscli.job import compute as job
    from hesscli.job.results import written

    if dry_run:
        document = job.dry_run(options, out)
        if shard is not None:
            out.note("--shard has no effect on a plan: it is of the whole Hessian")
        if fail_above is not None:
            out.note("--fail-above has no effect on a plan: nothing is computed")
        out.result(document, print_plan)
        return
    document = job.compute(options, out, out.stdout.buffer)
    if shard is not None:
        out.result(document)
        out.note(f"shard {shard} is done; when all are: hesscli merge {quote(output)}")
    elif rank() == 0:  # of the processes that torchrun started
        out.result(document, print_hessian)
        if options.output is not None:
            out.wrote(*written(options.output))
        filled = [facts for facts in document["blocks"] if facts["size"]]
        gate([(f"eig_max of {b['name']}", b["eig_max"]) for b in filled], fail_above)
