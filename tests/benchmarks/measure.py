"""Measures whole processes, model file to Hessian file, one tool after the other. Imports no torch.

This process must stay small: a child's peak memory never reads as less than its parent's.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.tasks import CHUNKS, EIGEN, GRADIENT, PACKAGES, PRODUCT, Task

ROOT = Path(__file__).parents[2]
OURS = "hesscli"
TOLERANCE = 1e-3  # relative Frobenius error between two float32 results
TIMEOUT = 5  # limits, after which a process is killed
LEAST = 0.1  # seconds less the import that can be told: hesscli starts and ends sooner than `import torch` does


class FailedError(Exception):
    """A process ended badly; the message is why."""


@dataclass(frozen=True)
class Settings:
    repeats: int = 5
    toy: bool = False
    threads: int = 1
    device: str = "cpu"
    limit: float = 60.0  # seconds of a peer's run, beyond which rows are extrapolated
    peers: tuple[str, ...] = ()  # only these; empty: the task's


@dataclass(frozen=True)
class Run:
    whole: float  # seconds of the process, plus `missing`
    inside: float  # seconds between reading the model and the finished file, plus `missing`
    missing: float  # seconds that the rows left out would have taken
    peak: int  # bytes of peak resident memory
    processor: float  # seconds of processor time really used, over all threads


@dataclass
class Tool:
    """One competitor's results."""

    name: str
    chunk: int | None = None
    runs: list[Run] = field(default_factory=list)
    share: float = 1.0  # of the rows that it really computed
    error: float | None = None  # relative distance from hesscli's result, or from a reference
    residual: float | None = None  # the greatest relative one of its eigenpairs, in float64
    products: int | None = None  # that its eigenpairs took
    # That a product took, with its share of making.
    gradients: list[float] = field(default_factory=list)
    further: list[float] = field(default_factory=list)  # that a further product took
    failure: str | None = None

    def median(self, part: Callable[[Run], float]) -> float:
        return statistics.median(part(run) for run in self.runs)


@dataclass
class Measured:
    """All that one task gave."""

    task: Task
    parameters: int
    samples: int
    tools: list[Tool]
    method: str = ""  # hesscli's
    estimate: float | None = None  # seconds in process, as `--dry-run` says beforehand
    bytes: int = 0  # of hesscli's file
    imports: list[float] = field(default_factory=list)  # seconds of `import torch`
    import_peak: int = 0
    gradients: list[float] = field(default_factory=list)  # seconds of one gradient
    gemm: list[float] = field(default_factory=list)  # flop/s
    writes: list[float] = field(default_factory=list)  # seconds of a plain write

    @property
    def ours(self) -> Tool:
        return self.tools[0]

    def less_import(self, whole: float) -> float:
        return max(whole - statistics.median(self.imports or [0.0]), LEAST)

    def seconds(self, tool: Tool) -> float:
        """Whole process less a bare `import torch`; of products, of one."""
        if self.task.blocks == PRODUCT:
            return tool.median(lambda run: run.inside)
        return self.less_import(tool.median(lambda run: run.whole))

    def ratio(self, tool: Tool) -> tuple[float, float, float]:
        """How many times as long as hesscli: of the medians; least and most in one round."""
        if self.task.blocks == PRODUCT:
            pairs = zip(self.ours.gradients, tool.gradients, strict=False)
            each = [theirs / ours for ours, theirs in pairs]
            return statistics.median(tool.gradients) / self.in_gradients(), min(each), max(each)
        rounds = [
            self.less_import(theirs.whole) / self.less_import(ours.whole)
            for ours, theirs in zip(self.ours.runs, tool.runs, strict=False)
        ]
        return self.seconds(tool) / self.seconds(self.ours), min(rounds), max(rounds)

    def in_gradients(self) -> float:
        if self.task.blocks == PRODUCT:
            return statistics.median(self.ours.gradients)
        return self.seconds(self.ours) / statistics.median(self.gradients)

    def gemm_efficiency(self, seconds: float) -> float:
        """B P^2 / (seconds x rate). A symmetric matrix takes B P^2 / 2 multiply-adds."""
        flops = self.samples * self.parameters**2
        return flops / (seconds * statistics.median(self.gemm))

    def agrees(self, tool: Tool) -> bool:
        if tool.error is None or tool.error < TOLERANCE or tool.name in self.task.wrong:
            return True
        return self.task.blocks == EIGEN and tool is not self.ours  # how far off is told

    @property
    def estimate_ratio(self) -> float | None:
        """The dry run's seconds as a share of those that the runs then took, in process."""
        if self.estimate is None or not self.ours.runs:
            return None
        return self.estimate / self.ours.median(lambda run: run.inside)

    @property
    def sound(self) -> bool:
        """Whether hesscli ran, and all that ran agree, but for what is known to be wrong."""
        ran = [tool for tool in self.tools if tool.runs]
        return self.ours in ran and all(self.agrees(tool) for tool in ran)


def run_task(
    bench: type[Bench], task: Task, settings: Settings, say: Callable[[str], None]
) -> Measured:
    """Runs a task's tools in turn, as often as the settings say."""
    with tempfile.TemporaryDirectory(prefix="hesscli-benchmark-") as folder:
        return bench(task, settings, Path(folder), say).measure()


@dataclass(frozen=True)
class _Spent:
    """What one process took, and its stdout."""

    seconds: float
    processor: float
    peak: int
    text: str


class Bench:
    def __init__(
        self, task: Task, settings: Settings, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.task, self.settings, self.folder, self.say = task, settings, folder, say
        self.files = {"model": str(folder / "model.pt"), "data": str(folder / "data.npz")}
        self.problem = {"task": task.name, "toy": settings.toy} | self.files
        self.output = folder / "ours.safetensors"

    def measure(self) -> Measured:
        facts = self._job("build", **self.problem)
        peers = [
            peer
            for peer in self.task.peers
            if not self.settings.peers or peer in self.settings.peers
        ]
        tools = [Tool(OURS)] + [Tool(peer) for peer in peers if peer != GRADIENT]
        measured = Measured(self.task, facts["parameters"], facts["samples"], tools)
        for tool in tools[1:]:
            self._prepare(tool)
        for repeat in range(self.settings.repeats):
            self.say(f"{self.task.name}: round {repeat + 1} of {self.settings.repeats}")
            self._round(measured, first=repeat == 0)
            if not self.settings.toy:
                self._machine(measured)
        return measured

    def _machine(self, measured: Measured) -> None:
        """What this machine takes for a gradient, a product of matrices, and a plain write."""
        if GRADIENT in self.task.peers:
            measured.gradients.append(self._job("gradient", **self.problem)["seconds"])
        if self.task.blocks == "full":
            measured.gemm.append(self._job("gemm")["rate"])
        if measured.bytes:
            plain = {"size": measured.bytes, "output": str(self.folder / "plain")}
            measured.writes.append(self._job("write", **plain)["seconds"])

    def _round(self, measured: Measured, first: bool) -> None:
        if not self.settings.toy:
            self._import(measured)
        self._try(measured.ours, lambda tool: self._ours(tool, measured))
        for tool in measured.tools[1:]:
            if first or not self._slow(tool):
                self._try(tool, lambda tool: self._peer(tool, first))

    def _try(self, tool: Tool, run: Callable[[Tool], None]) -> None:
        """One run of a tool that did not fail before."""
        if tool.failure:
            return
        self.say(f"{self.task.name}: {tool.name}")
        try:
            run(tool)
        except FailedError as reason:
            tool.failure = str(reason)

    def _installed(self, tool: Tool) -> bool:
        package = PACKAGES.get(tool.name)
        if package and find_spec(package) is None:
            tool.failure = "not installed"
        return tool.failure is None

    def _prepare(self, tool: Tool) -> None:
        if not self._installed(tool) or tool.name not in CHUNKS:
            return
        if CHUNKS[tool.name] == (1,):
            tool.chunk = 1
        elif self.settings.toy:
            tool.chunk = 7
        else:
            self.say(f"{self.task.name}: {tool.name}, rows at a time")
            try:
                tool.chunk = self._job("tune", peer=tool.name, **self.problem)["chunk"]
            except FailedError as reason:
                tool.failure = str(reason)

    def _slow(self, tool: Tool) -> bool:
        """Whether one run is all that there is time for."""
        return bool(tool.runs) and (
            tool.runs[0].whole - tool.runs[0].missing > 2 * self.settings.limit
        )

    def _import(self, measured: Measured) -> None:
        spent = self._process([sys.executable, "-c", "import torch"])
        measured.imports.append(spent.seconds)
        measured.import_peak = max(measured.import_peak, spent.peak)

    def _ours(self, tool: Tool, measured: Measured) -> None:
        command = [
            *(sys.executable, "-m", "hesscli", "compute", *self.files.values()),
            *("--blocks", self.task.blocks, "--output", str(self.output)),
            *("--stats", "none", "--threads", str(self.settings.threads), "--json"),
            *("--device", self.settings.device),
        ]
        if measured.estimate is None:
            planned = json.loads(self._process([*command, "--dry-run"]).text)
            measured.estimate = planned["total"]["estimated_seconds"]
        self.output.unlink(missing_ok=True)  # freeing its pages would be part of the next run
        spent = self._process(command)
        document = json.loads(spent.text)
        tool.runs.append(Run(spent.seconds, document["seconds"], 0.0, spent.peak, spent.processor))
        measured.method = document["method"]
        measured.bytes = self.output.stat().st_size

    def _peer(self, tool: Tool, first: bool) -> None:
        output = self.folder / f"{tool.name}.safetensors"
        arguments = self.problem | {
            "peer": tool.name,
            "output": str(output),
            "chunk": tool.chunk,
            "limit": self.settings.limit,
        }
        try:
            spent = self._process(self._command_of("run", arguments))
            facts = last_line(spent.text)
            missing = facts["missing"]
            whole, inside = spent.seconds + missing, facts["seconds"] + missing
            tool.runs.append(Run(whole, inside, missing, spent.peak, spent.processor))
            tool.share = facts["share"]
            if first and self.output.exists():
                files = {"ours": str(self.output), "theirs": str(output)}
                tool.error = self._job("compare", **files)["error"]
        finally:
            output.unlink(missing_ok=True)

    def _job(self, job: str, **arguments: Any) -> dict[str, Any]:
        return last_line(self._process(self._command_of(job, arguments)).text)

    def _command_of(self, job: str, arguments: dict[str, Any]) -> list[str]:
        words = (self.settings.device, job, json.dumps(arguments))
        return [sys.executable, "-m", "tests.benchmarks.job", *words]

    def _process(self, command: Sequence[str]) -> _Spent:
        """Runs one process to its end.

        Raises:
            FailedError: it ended badly, or was killed for taking too long.
        """
        threads = str(self.settings.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # every tool starts from compiled code
        out, err = self.folder / "stdout", self.folder / "stderr"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            if not self.settings.toy:
                os.sync()  # what others wrote shall not be on its way to the disk
            started = time.perf_counter()
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr
            )
            limit = TIMEOUT * max(self.settings.limit, 60)
            timer = threading.Timer(limit, _kill, (child.pid,))
            timer.start()
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - started
            timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise FailedError(_reason(child.returncode, err.read_text(errors="replace"), limit))
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return _Spent(seconds, usage.ru_utime + usage.ru_stime, peak, out.read_text())


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _reason(code: int, talk: str, limit: float) -> str:
    if "allocate memory" in talk or "MemoryError" in talk:
        return "out of memory"
    if code == -signal.SIGKILL:
        return f"killed, perhaps after {limit:.0f} s"
    lines = [line for line in talk.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")] or lines[-1:]
    return told[0] if told else f"exit code {code}"
