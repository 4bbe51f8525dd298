"""`python -m tests.benchmarks [TASK ...]`: hesscli against its peers.

Every measurement is a whole process, from a saved model and data to a Hessian file, or to eigenvalues; but a product
is timed by itself, in turn with gradients. hesscli also checks its result and flushes it to the disk; the peers do
neither. "less import" is less the median of a bare `import torch`, which hesscli starts and ends sooner than: 0.1 s is
the least that is told. The chunk, rows at a time, is tuned for each peer beforehand, and that time is not counted.
Equality is tested in the first round, before any time is shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.matrix_free import BENCHES
from tests.benchmarks.measure import Bench, FailedError, Measured, Settings, run_task
from tests.benchmarks.tables import broken, equality, remarks, timings
from tests.benchmarks.tasks import BY_NAME, TASKS

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
  python -m tests.benchmarks eigen-mlp product-mlp    without a matrix
  python -m tests.benchmarks losing-conv losing-vocabulary    where there is little to gain
  python -m tests.benchmarks --device cuda full-mlp full-wide    on a GPU
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
        device=arguments.device,
        limit=arguments.limit,
        peers=tuple(arguments.peer),
    )
    machine = describe_machine(settings)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), markup=False)
    talk = Console(stderr=True, highlight=False)
    results, sound = [], True
    for task in arguments.task:
        with talk.status(task.name) as status:
            try:
                bench = BENCHES.get(task.blocks, Bench)
                measured = run_task(bench, task, settings, status.update)
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
        "--device", default="cpu", help="cpu, or cuda for the tasks with a matrix (default: cpu)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        metavar="SECONDS",
        help="of a peer's run; what it does row by row is extrapolated beyond (default: 60)",
    )
    arguments = parser.parse_args()
    fit = [task.name for task in TASKS if arguments.device == "cpu" or task.blocks not in BENCHES]
    for task in arguments.task:
        if task not in fit:
            parser.error(f"no task is called {task}; there are {', '.join(fit)}")
    arguments.task = [BY_NAME[name] for name in arguments.task or fit]
    return arguments


def describe_machine(settings: Settings) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": settings.threads,
        "device": _device(settings.device),
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


def _device(name: str) -> str:
    """A GPU by the name that its maker gives it."""
    if name == "cpu":
        return name
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


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


if __name__ == "__main__":
    sys.exit(main())
