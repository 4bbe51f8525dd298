"""`hesscli compute`: the Hessian of a saved model, block by block, checked and written."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from hesscli.errors import UsageError
from hesscli.files.hessians.result_names import followed, journals
from hesscli.job.json_form import Document
from hesscli.job.matrix.dry_run import forecast
from hesscli.job.matrix.journal import read_journal
from hesscli.job.matrix.planning import Plan
from hesscli.job.matrix.room import require_disk, require_memory
from hesscli.job.matrix.run import Run
from hesscli.job.matrix.wrong_routes import leave_out_wrong_routes
from hesscli.job.options import ComputeOptions, Listener, options_of
from hesscli.job.results import demand_names, writable, written
from hesscli.job.setup.opening import open_problem
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.team import Team


def compute(
    options: ComputeOptions,
    listener: Listener,
    stdout: BinaryIO | None = None,
    alone: bool = False,
) -> Document:
    """Computes the Hessian that the options ask for and writes it; without an output file, to `stdout`.

    Where `torchrun` started several processes, each computes its share, and the first finishes the file; unless this
    one does it `alone`.

    Returns the JSON document, without blocks for a shard. Where it raises, any HesscliError, nothing is written.
    """
    started = time.perf_counter()
    if options.output is not None:
        output = writable(options.output, options.force, options.files, resumable=True)
        options = replace(options, output=output)
    with Team(alone) as team:
        plan = _planned(options, listener, team)
        require_disk(plan)
        leave_out_wrong_routes(plan)
        require_memory(plan)  # of the routes that are left, as the dry run shows it
        document = Run(plan, team, stdout=stdout).run()
    if options.shard is not None:
        del document["blocks"]  # no numbers of theirs are known
        document["shard"] = list(options.shard)
    output_name = "-" if options.output is None else str(written(options.output)[0])
    return document | {"seconds": time.perf_counter() - started, "output": output_name}


def dry_run(options: ComputeOptions, listener: Listener) -> Document:
    """What `compute` would take, as a JSON document."""
    started = time.perf_counter()
    with Team() as team:
        plan = _planned(options, listener, team)
        leave_out_wrong_routes(plan)
        document = forecast(plan)
    output_name = "-" if options.output is None else str(options.output)
    return document | {"seconds": time.perf_counter() - started, "output": output_name}


def _planned(options: ComputeOptions, listener: Listener, team: Team) -> Plan:
    several = options.shard is not None or team.size > 1
    if options.output is None and (several or options.max_shard_size is not None):
        what = "processes cannot write" if several else "files cannot go"
        raise UsageError(f"-: several {what} to a pipe", "-o hessian.safetensors")
    if options.shard is not None and team.size > 1:
        number, count = options.shard
        raise UsageError(
            f"--shard: a share is one process's, and torchrun started {team.size}",
            f"--shard {number}/{count}",
        )
    if options.output is None and options.resume:
        raise UsageError("-: a pipe keeps nothing to resume", "-o hessian.safetensors")
    opened = open_problem(options, listener, Processes(team, side_by_side=False))
    plan = Plan(options, opened, several)
    demand_names((block.name for block in plan.blocks), plan.shapes, options.gradient)
    return plan


def merge(output: Path, listener: Listener) -> Document:
    """Finishes a file whose parts were computed as shards; UsageError where there are none, or some are missing."""
    started = time.perf_counter()
    if output == Path("-"):
        raise UsageError("-: shards are in files, and none come from standard input")
    output = followed(output)
    begun = [read_journal(path) for path in journals(output)]
    command = next((each.command for each in begun if each.head is not None), None)
    if command is None:
        raise UsageError(
            f"{output}: no shards of it are here",
            f"hesscli compute model.pt data.npz -o {shlex.quote(str(output))} --shard 1/4",
        )
    options = options_of(command, output)
    writable(output, True, options.files, resumable=True)
    plan = Plan(options, open_problem(options, listener), divided=True)
    leave_out_wrong_routes(plan)
    document = Run(plan, Team(alone=True), merging=True).run()
    seconds = time.perf_counter() - started
    return document | {"seconds": seconds, "output": str(written(output)[0])}
