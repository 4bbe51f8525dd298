"""Blocks too large to be held and symmetrised whole: computed in bands, written while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hesscli.errors import NumericalError
from hesscli.files.hessian_writer import HessianWriter
from hesscli.hessian.blocks import Block
from hesscli.hessian.check import Certificate
from hesscli.hessian.kronecker import mirror_
from hesscli.hessian.layout import Layout, Span
from hesscli.hessian.routes.base import NotApplicable, Route, Rows
from hesscli.hessian.symmetry import average_
from hesscli.job import document as documents
from hesscli.job.beside import Beside
from hesscli.job.document import Document
from hesscli.job.journal import Facts, Journal
from hesscli.job.planning import Plan
from hesscli.job.triangles import HeldTriangle, StreamedTriangle, Triangle


class LargeBlock:
    """One large block of a plan, by the first of its routes that is exact."""

    def __init__(self, plan: Plan, block: Block) -> None:
        self.plan, self.block = plan, block
        self.place = 0  # of the route among the block's choices

    @property
    def method(self) -> str:
        return self.plan.choices[self.block.name][self.place].method

    def count(self) -> int:
        """How many bands there are; 0 if the route finds out that it cannot give any."""
        try:
            return len(self._cut()[1])
        except NotApplicable:
            return 0

    def _cut(self) -> tuple[Layout, list[Span]]:
        layout = self.plan.routes[self.method].layout(self.block)
        return layout, layout.cut(self.plan.band(self.block))

    def compute(
        self,
        writer: HessianWriter,
        journal: Journal,
        certificate: Certificate | None,
        progress: Callable[[int, str], None],
    ) -> Document:
        """Computes, writes and checks the block; by the next route, where one cannot or does not pass.

        Args:
            writer: of the file.
            journal: knows the bands that are in the file already.
            certificate: checks the block, if anything does.
            progress: is told how many rows more are done.

        Returns:
            the block's facts, without extreme eigenvalues.

        Raises:
            NumericalError: no route is exact.
        """
        while True:
            failed = f"{self.block.name}, {self.method}, not exact"
            if failed in journal.finished:
                self.plan.recall(journal.finished[failed]["notes"])
                self.place += 1
                continue
            try:
                matrix, symmetry = self._bands(writer, journal, certificate, progress)
            except NotApplicable as reason:
                self.plan.next_route(self.block, self.place, reason)
                self.place += 1
                continue
            error = None if certificate is None else certificate.matrix(self.block, matrix)
            matrix.finish()
            if not matrix.squares < float("inf"):
                raise NumericalError(
                    f"{self.block.name}: its Hessian is not finite (NaN or inf)",
                    self.plan.more_digits(),
                )
            if certificate is None or error is None or certificate.passed(error):
                break
            self.plan.differs(self.block, self.place, error, certificate.tolerance)
            journal.add(failed, {"notes": list(self.plan.opened.notes)}, writer)
            self.place += 1
        return documents.block_facts(self.plan.opened, self.block) | {
            "method": self.method,
            "trace": matrix.trace,
            "eig_max": None,
            "eig_min": None,
            "fro_norm": matrix.squares**0.5,
            "bytes": self.block.size**2 * self.plan.problem.dtype.itemsize,
            "symmetry_error": symmetry,
            "check_error": error,
            "zero": matrix.squares == 0,
        }

    def _bands(
        self,
        writer: HessianWriter,
        journal: Journal,
        certificate: Certificate | None,
        progress: Callable[[int, str], None],
    ) -> tuple[Triangle, float]:
        """The matrix, written, and its symmetry error."""
        route = self.plan.routes[self.method]
        layout, bands = self._cut()
        writer.forget(self.block.name)
        kind = HeldTriangle if self.plan.keeps(self.block) else StreamedTriangle
        direction = torch.zeros(self.block.size)
        if certificate is not None:
            direction = certificate.direction(self.block)
        direction = direction.to("cpu", self.plan.problem.dtype)
        matrix = kind(self.block.name, layout, bands, writer, direction)

        def put(index: int, upper: Tensor, part: str, facts: Facts) -> None:
            matrix.put(index, upper)
            journal.add(part, facts, writer)

        gap = square = 0.0
        with Beside() as beside:
            for index, (start, stop) in enumerate(bands):
                part = f"{self.block.name}, {self.method}, band {index}"
                facts = journal.finished.get(part)
                if facts is not None:
                    beside.run(matrix.restore, index)
                else:
                    upper, facts = self._band(route, start, stop)
                    beside.run(put, index, upper, part, facts)
                gap, square = gap + facts["gap"], square + facts["square"]
                progress(stop - start, self.block.name)
        return matrix, (gap / square) ** 0.5 if square else 0.0

    def _band(self, route: Route, start: int, stop: int) -> tuple[Tensor, Facts]:
        """Rows `start` to `stop` of the upper triangle, on the host, their square symmetric."""
        while True:
            try:
                like = next(iter(route.problem.parameters.values())).detach()
                upper = torch.zeros(
                    stop - start, self.block.size - start, dtype=like.dtype, device=like.device
                )
                rows = Rows(self.block, start, stop, upper)
                for batch in route.problem.batches:
                    route.add(batch, [rows])
                break
            except torch.OutOfMemoryError:
                if not route.shrink():
                    raise
            # Outside the handler, which holds on to the failed pass.
            torch.cuda.empty_cache()
        own = upper[:, : stop - start]
        facts = {"gap": 0.0, "square": 0.0}
        if route.symmetric:
            mirror_(own)
        else:
            facts = {"gap": average_(own), "square": float(own.double().square().sum())}
        return on_host(upper.to(self.plan.problem.dtype)), facts


def on_host(values: Tensor) -> Tensor:
    """Values in the host's memory; from a GPU by way of pinned memory, several times as fast."""
    if values.device.type == "cuda":
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
    return values.cpu()
