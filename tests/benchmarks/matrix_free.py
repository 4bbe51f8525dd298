"""Measures eigenvalues and products without a matrix. Imports no torch.

Eigenvalues are whole processes, from a saved model to eigenpairs; all are judged in the first round,
before any time is shown. Products are timed inside a process, in turn with gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.benchmarks.measure import Bench, Measured, Run, Tool, last_line
from tests.benchmarks.tasks import EIGEN, PAIRS, PAIRS_TOLERANCE, PRODUCT


class EigenBench(Bench):
    def _prepare(self, tool: Tool) -> None:
        self._installed(tool)

    def _ours(self, tool: Tool, measured: Measured) -> None:
        command = [
            *(sys.executable, "-m", "hesscli", "eigen", *self.files.values()),
            *("--top", str(PAIRS), "--tol", str(PAIRS_TOLERANCE), "--json"),
        ]
        if not tool.runs:  # once more, for the judge
            self._process([*command, "--output", str(self.output)])
        spent = self._process(command)
        document = json.loads(spent.text)
        tool.runs.append(Run(spent.seconds, document["seconds"], 0.0, spent.peak, spent.processor))
        tool.products = document["products"]
        measured.method = document["method"]

    def _peer(self, tool: Tool, first: bool) -> None:
        arguments = self.problem | {"peer": tool.name, "output": str(self._pairs(tool))}
        spent = self._process(self._command_of("eigen", arguments))
        facts = last_line(spent.text)
        tool.runs.append(Run(spent.seconds, facts["seconds"], 0.0, spent.peak, spent.processor))
        tool.products = facts["products"]

    def _round(self, measured: Measured, first: bool) -> None:
        super()._round(measured, first)
        ran = [tool for tool in measured.tools if tool.runs]
        if first and ran:
            self.say(f"{self.task.name}: a float64 reference")
            found = {tool.name: str(self._pairs(tool)) for tool in ran}
            facts = self._job("judge", found=found, **self.problem)
            for tool in ran:
                tool.error = facts[tool.name]["error"]
                tool.residual = facts[tool.name]["residual"]

    def _pairs(self, tool: Tool) -> Path:
        return self.folder / f"{tool.name}.pairs" if tool.name in self.task.peers else self.output


class ProductBench(Bench):
    def _prepare(self, tool: Tool) -> None:
        self._installed(tool)

    def _ours(self, tool: Tool, measured: Measured) -> None:
        measured.gradients.append(self._product(tool))

    def _peer(self, tool: Tool, first: bool) -> None:
        self._product(tool)

    def _product(self, tool: Tool) -> float:
        """Times products beside gradients; returns the seconds of one gradient."""
        spent = self._process(self._command_of("product", self.problem | {"peer": tool.name}))
        facts = last_line(spent.text)
        tool.runs.append(Run(spent.seconds, facts["seconds"], 0.0, spent.peak, spent.processor))
        tool.gradients.append(facts["gradients"])
        tool.further.append(facts["further"])
        tool.error = max(facts["error"], tool.error or 0.0)
        return facts["gradient"]


BENCHES: dict[str, type[Bench]] = {EIGEN: EigenBench, PRODUCT: ProductBench}
