"""What was measured, as tables and remarks."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from tests.benchmarks.measure import LEAST, OURS, TOLERANCE, Measured, Tool
from tests.benchmarks.tasks import EIGEN, GEMM, GRADIENT, PRODUCT, PRODUCTS


def timings(measured: Measured) -> Table:
    """One row per tool."""
    if measured.task.blocks == PRODUCT:
        return products(measured)
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
            _less_import(measured.seconds(tool)),
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


def products(measured: Measured) -> Table:
    """What a product takes, in gradients of the same problem."""
    table = Table()
    for heading in ("tool", f"one of {PRODUCTS}, made", "in gradients", "a further one"):
        table.add_column(heading, justify="left" if heading == "tool" else "right", no_wrap=True)
    for heading in ("/ hesscli", "result", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for tool in measured.tools:
        cells = [""] * 4
        if tool.runs and measured.agrees(tool):
            costs = tool.gradients
            cells = [
                f"{tool.median(lambda run: run.inside) * 1e3:.1f} ms",
                _spread(statistics.median(costs), min(costs), max(costs)),
                _s(statistics.median(tool.further)),
                _ratio(measured, tool),
            ]
        table.add_row(tool.name, *cells, agreement(measured, tool), _note(tool))
    return table


def equality(measured: Measured) -> Table:
    table = Table()
    for heading in ("tool", "result", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for tool in measured.tools:
        table.add_row(tool.name, agreement(measured, tool), _note(tool, rounds=False))
    return table


def agreement(measured: Measured, tool: Tool) -> str:
    if not tool.runs or tool.error is None:
        return ""
    if tool.error < TOLERANCE:
        return f"equal, {tool.error:.0e}"
    if measured.task.blocks == EIGEN and tool is not measured.ours:
        return f"off by {tool.error:.1%}"
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
    if measured.method:
        lines.append(f"method: {measured.method}")
    ours = measured.seconds(measured.ours)
    if measured.estimate_ratio is not None:
        lines.append(
            f"dry run: estimated {_s(measured.estimate or 0)} s in process, "
            f"{measured.estimate_ratio:.2f} x what it took"
        )
    if measured.gradients:
        value, goal = measured.in_gradients(), measured.task.goal(GRADIENT)
        lines.append(f"hesscli took {value:.3g} gradients" + _judged(goal, value))
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


def _note(tool: Tool, rounds: bool = True) -> str:
    notes = [tool.failure] if tool.failure else []
    if tool.chunk and tool.chunk > 1:
        notes.append(f"chunk {tool.chunk}")
    if tool.products is not None:
        notes.append(f"{tool.products} products")
    if tool.residual is not None:
        notes.append(f"residual {tool.residual:.0e}")
    if tool.share < 1:
        notes.append(f"from {tool.share:.1%} of rows")
    if rounds and len(tool.runs) == 1:
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


def _less_import(seconds: float) -> str:
    return _s(seconds) if seconds > LEAST else f"<= {LEAST}"


def _judged(goal: Any, value: float) -> str:
    return "" if goal is None else f", wanted {goal}: {'met' if goal.met(value) else 'missed'}"


def _spread(middle: float, least: float, most: float, unit: str = "") -> str:
    text = f"{_s(middle)}{unit}"
    return text if least == most else f"{text} [{_s(least)} .. {_s(most)}]"


def _s(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
