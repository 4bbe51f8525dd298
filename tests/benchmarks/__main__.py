"""`python -m tests.benchmarks [TASK ...]`: hesscli against its peers.

Every measurement is a whole process, from a saved model and data to a Hessian file. hesscli also
checks its result and flushes it to the disk; the peers do neither. "less import" is less the
median of a bare `import torch`. The chunk, rows at a time, is tuned for each peer beforehand, and
that time is not counted. Equality is tested in the first round, before any time is shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import OURS, TOLERANCE, FailedError, Measured, Settings, Tool, measure
from tests.benchmarks.tasks import BY_NAME, GEMM, GRADIENT, TASKS

DISTRIBUTIONS = (
    "torch",
    "numpy",
    "hesscli",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "PyHessian",
    "hessian-eigenthings",
)

EXAMPLES = """examples:
  python -m tests.benchmarks                           every task: hours, most of them the peers'
  python -m tests.benchmarks --limit 6 --json all.json    half an hour; slow peers are extrapolated
  python -m tests.benchmarks --limit 600 full-mlp      rows one by one to the end, for one task
  python -m tests.benchmarks elements-cnn --peer backpack    against one peer
  python -m tests.benchmarks losing-conv losing-tied losing-vocabulary    where there is little to gain
  python -m tests.benchmarks --toy                     only that all agree; no times
"""


def main() -> int:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    if arguments.list:
        for task in TASKS:
            console.print(f"{task.name:18} {task.title}", markup=False)
        return 0
    settings = Settings(
        repeats=1 if arguments.toy else arguments.repeats,
        toy=arguments.toy,
        threads=arguments.threads,
        limit=arguments.limit,
        peers=tuple(arguments.peer),
    )
    machine = describe_machine(settings)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), markup=False)
    talk = Console(stderr=True, highlight=False)
    results, sound = [], True
    for task in [BY_NAME[name] for name in arguments.task] or TASKS:
        with talk.status(task.name) as status:
            try:
                measured = measure(task, settings, status.update)
            except FailedError as reason:
                console.print(f"{task.name}: {reason}", markup=False)
                sound = False
                continue
        console.print(task.title + (" (at toy size)" if settings.toy else ""), markup=False)
        console.print(equality(measured) if settings.toy else timings(measured))
        if not settings.toy:
            for line in remarks(measured):
                console.print(line, markup=False)
        results.append(as_json(measured))
        sound &= measured.sound and not (settings.toy and broken(measured))
        if arguments.json:
            document = {"machine": machine, "tasks": results}
            arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if sound else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="*", metavar="TASK", help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny models, one round, no times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--list", action="store_true", help="list the tasks")
    parser.add_argument("--peer", action="append", default=[], help="only this peer; repeatable")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="of every process")
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        metavar="SECONDS",
        help="of a peer's run; what it does row by row is extrapolated beyond (default: 60)",
    )
    arguments = parser.parse_args()
    for task in arguments.task:
        if task not in BY_NAME:
            parser.error(f"no task is called {task}; there are {', '.join(BY_NAME)}")
    return arguments


def describe_machine(settings: Settings) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": settings.threads,
        "Python": platform.python_version(),
    }
    for distribution in DISTRIBUTIONS:
        try:
            facts[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timings(measured: Measured) -> Table:
    table = Table()
    for heading in ("tool", "whole process", "less import", "in process", "peak RSS"):
        table.add_column(heading, justify="left" if heading == "tool" else "right", no_wrap=True)
    for heading in ("/ hesscli", "wanted", "result", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for tool in measured.tools:
        note = _note(tool)
        if not tool.runs or not measured.agrees(tool):
            blank = [""] * 6
            table.add_row(tool.name, *blank, agreement(measured, tool), note)
            continue
        whole = [run.whole for run in tool.runs]
        table.add_row(
            tool.name,
            _spread(statistics.median(whole), min(whole), max(whole)),
            _s(measured.seconds(tool)),
            _s(tool.median(lambda run: run.inside)),
            f"{tool.median(lambda run: run.peak) / 1e6:,.0f} MB",
            _ratio(measured, tool),
            _wanted(measured, tool),
            agreement(measured, tool),
            note,
        )
    if measured.gradients:
        seconds = statistics.median(measured.gradients)
        table.add_row("one gradient", "", "", f"{seconds * 1e3:.1f} ms")
    return table


def equality(measured: Measured) -> Table:
    table = Table()
    for heading in ("tool", "result", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for tool in measured.tools:
        table.add_row(tool.name, agreement(measured, tool), tool.failure or "")
    return table


def agreement(measured: Measured, tool: Tool) -> str:
    if not tool.runs or tool.error is None:
        return ""
    if tool.error < TOLERANCE:
        return f"equal, {tool.error:.0e}"
    known = "wrong" if tool.name in measured.task.wrong else "DIFFERS"
    return f"{known} ({tool.error:.1%})"


def broken(measured: Measured) -> bool:
    """Whether a tool failed that is installed."""
    return any(tool.failure not in (None, "not installed") for tool in measured.tools)


def remarks(measured: Measured) -> list[str]:
    """What the table has no room for."""
    lines = [f"import torch: {_s(statistics.median(measured.imports))} s"]
    if not measured.ours.runs:
        return lines
    lines.append(f"method: {measured.method}")
    ours = measured.seconds(measured.ours)
    if measured.estimate_ratio is not None:
        lines.append(
            f"dry run: estimated {_s(measured.estimate or 0)} s in process, "
            f"{measured.estimate_ratio:.2f} x what it took"
        )
    if measured.gradients:
        value, goal = measured.in_gradients(), measured.task.goal(GRADIENT)
        lines.append(f"hesscli took {value:.1f} gradients" + _judged(goal, value))
    if measured.gemm:
        inside = measured.ours.median(lambda run: run.inside)
        value, goal = measured.gemm_efficiency(ours), measured.task.goal(GEMM)
        lines.append(
            f"GEMM efficiency B P^2 / (seconds x rate): {value:.0%}{_judged(goal, value)}, "
            f"in process {measured.gemm_efficiency(inside):.0%}, "
            f"of {statistics.median(measured.gemm) / 1e9:.0f} GF/s"
        )
        matrix, peak = 4 * measured.parameters**2, measured.ours.median(lambda run: run.peak)
        lines.append(
            f"peak RSS: {peak / matrix:.2f} x 4 P^2 bytes, "
            f"{(peak - measured.import_peak) / matrix:.2f} x above that of import torch"
        )
    if measured.writes:
        plain = measured.bytes / statistics.median(measured.writes) / 1e6
        ours_rate = measured.bytes / ours / 1e6
        lines.append(
            f"file: {measured.bytes / 1e6:,.1f} MB, {ours_rate:,.0f} MB/s with the computation; "
            f"a plain write with fsync: {plain:,.0f} MB/s"
        )
    return lines


def as_json(measured: Measured) -> dict[str, Any]:
    document = asdict(measured)
    task = measured.task
    document["task"] = task.name
    document["title"] = task.title
    document["blocks"] = task.blocks
    for tool, entry in zip(measured.tools, document["tools"], strict=True):
        entry["known_wrong"] = tool.name in task.wrong
        if tool.runs:
            entry["seconds"] = measured.seconds(tool)
            if measured.ours.runs:
                entry["ratio"] = measured.ratio(tool)
    document["estimate_ratio"] = measured.estimate_ratio
    if measured.ours.runs and measured.gemm:
        document["gemm_efficiency"] = measured.gemm_efficiency(measured.seconds(measured.ours))
    if measured.ours.runs and measured.gradients:
        document["in_gradients"] = measured.in_gradients()
    document["goals"] = [asdict(goal) for goal in task.goals]
    return document


def _note(tool: Tool) -> str:
    notes = [tool.failure] if tool.failure else []
    if tool.chunk and tool.chunk > 1:
        notes.append(f"chunk {tool.chunk}")
    if tool.share < 1:
        notes.append(f"from {tool.share:.1%} of rows")
    if len(tool.runs) == 1:
        notes.append("1 run")
    return ", ".join(notes)


def _ratio(measured: Measured, tool: Tool) -> str:
    if tool.name == OURS or not measured.ours.runs:
        return ""
    return _spread(*measured.ratio(tool), "x")


def _wanted(measured: Measured, tool: Tool) -> str:
    goal = measured.task.goal(tool.name)
    if goal is None or not measured.ours.runs:
        return str(goal or "")
    return f"{goal}: {'met' if goal.met(measured.ratio(tool)[0]) else 'missed'}"


def _judged(goal: Any, value: float) -> str:
    return "" if goal is None else f", wanted {goal}: {'met' if goal.met(value) else 'missed'}"


def _spread(middle: float, least: float, most: float, unit: str = "") -> str:
    text = f"{_s(middle)}{unit}"
    return text if least == most else f"{text} [{_s(least)} .. {_s(most)}]"


def _s(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


if __name__ == "__main__":
    sys.exit(main())
