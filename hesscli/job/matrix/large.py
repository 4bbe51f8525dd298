"""Blocks too large to be held and symmetrised whole: computed in bands, written while the next one is computed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hesscli.files.malloc import release_at_once
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout, Span
from hesscli.hessian.routes.base import Route, Rows, fitting
from hesscli.hessian.symmetry import average_, mirror_
from hesscli.job import documents
from hesscli.job.json_form import Document
from hesscli.job.matrix.background import Background
from hesscli.job.matrix.planning import Advance, Plan
from hesscli.job.matrix.ranking import Ranking
from hesscli.job.matrix.triangles import HeldTriangle, StreamedTriangle, Triangle
from hesscli.job.matrix.unfinished import Unfinished
from hesscli.spectrum.eigen import extremes
from hesscli.widest import wide

_PIECE = 1 << 20  # bytes of what goes back to the system when it is freed, where memory is short


@dataclass
class LargeBlock:
    """One large block of a plan, by the first of its routes that is exact."""

    plan: Plan
    block: Block
    most: int  # numbers in a band
    progress: Advance

    def __post_init__(self) -> None:
        self.ranking = Ranking(self.plan, self.block)

    def parts(self) -> list[tuple[str, float]]:
        """The name of each band, and its share of the work; none if the route finds out that it cannot give any."""
        try:
            layout, bands = self._banded()
        except NotApplicable:
            return []
        n = layout.size
        area = [(stop - start) * (n - (start + stop) / 2) for start, stop in bands]
        whole = self.ranking.choice.work.seconds(self.plan.rates)
        return [
            (self._part(index), whole * share / (n * n / 2)) for index, share in enumerate(area)
        ]

    def _part(self, index: int) -> str:
        return f"{self.block.name}, {self.ranking.route.name}, band {index}"

    def _banded(self) -> tuple[Layout, list[Span]]:
        """The order in which the route gives the rows, and the bands of it that are computed one by one."""
        route = self.ranking.route
        layout = route.layout(self.block)
        return layout, [(0, layout.size)] if route.at_once else layout.bands(self.most)

    @property
    def _given_up(self) -> str:
        """What notes that the route in front does not give the block."""
        return f"{self.block.name}, {self.ranking.route.name}, not exact"

    def is_given_up(self, finished: Collection[str]) -> bool:
        """Whether its bands are not to be waited for: who finishes the block takes the next route."""
        return self._given_up in finished

    def contribute(self, unfinished: Unfinished, mine: Collection[str]) -> None:
        """Computes and writes some of the bands; another process finishes the block."""
        if self.is_given_up(unfinished.finished):
            return
        try:
            self._bands(unfinished, torch.zeros(self.block.size), mine)
        except NotApplicable as reason:
            given_up = self._given_up
            self.ranking.refuse(reason)
            unfinished.add(given_up, {"notes": list(self.plan.opened.listener.notes)})

    def compute(self, unfinished: Unfinished) -> Document:
        """The facts of the block, which it computes, writes and checks; by the next route where one does not pass."""
        certificate = self.plan.certificate
        direction = torch.zeros(self.block.size)
        if certificate is not None:
            direction = certificate.direction(self.block)
        while True:
            method = self.ranking.method
            given_up = self._given_up
            if given_up in unfinished.finished:
                self.plan.opened.listener.note(*unfinished.finished[given_up]["notes"])
                self.ranking.skip()
                continue
            try:
                matrix, symmetry = self._bands(unfinished, direction)
            except NotApplicable as reason:
                self.ranking.refuse(reason)
                continue
            matrix.finish()
            error = None if certificate is None else certificate.symmetric(self.block, matrix.times)
            finite = math.isfinite(matrix.squares)  # which says more than a check that passes
            if self.ranking.accepts(error if finite else None, partial(bool, finite)):
                break
            unfinished.add(given_up, {"notes": list(self.plan.opened.listener.notes)})
        low = high = None
        if self.plan.options.stats == "all":
            low, high = extremes(unfinished.writer.mapped(self.block.name))
        return documents.block_facts(self.plan.opened, self.block) | {
            "method": method,
            "trace": matrix.trace,
            "eig_max": high,
            "eig_min": low,
            "fro_norm": matrix.squares**0.5,
            "bytes": self.block.size**2 * self.plan.problem.dtype.itemsize,
            "symmetry_error": symmetry,
            "check_error": error,
            "norm": matrix.squares**0.5,
        }

    def _bands(
        self, unfinished: Unfinished, direction: Tensor, mine: Collection[str] | None = None
    ) -> tuple[Triangle, float]:
        """The matrix, written, and its symmetry error; or some of its bands, where other processes have the others."""
        name, writer, route = self.block.name, unfinished.writer, self.ranking.route
        layout, bands = self._banded()
        writer.forget(name)
        fresh = not any(self._part(index) in unfinished.finished for index in range(len(bands)))
        direction = direction.to("cpu", self.plan.problem.dtype)
        given = name, layout, bands, writer, direction, fresh
        device = self.plan.memory.held_on(self.block)
        if device is None:
            release_at_once(_PIECE)
        matrix = StreamedTriangle(*given) if device is None else HeldTriangle(*given, device)

        def put(index: int, upper: Tensor, facts: Document) -> None:
            facts["bits"] = matrix.put(index, upper)
            unfinished.add(self._part(index), facts)

        gap = square = 0.0
        most = max((stop - start) * (layout.size - start) for start, stop in bands)
        rooms = [route.like.new_empty(most) for _ in bands[:2]]  # one is computed, one written
        with Background() as background:
            for index, (start, stop) in enumerate(bands):
                part = self._part(index)
                facts = unfinished.finished.get(part)
                if mine is not None and (part not in mine or facts is not None):
                    continue
                if facts is not None:
                    background.run(matrix.restore, index, facts["bits"])
                else:
                    rooms.reverse()
                    upper, facts = self._band(route, start, stop, rooms[0])
                    background.run(put, index, upper, facts)
                gap, square = gap + facts["gap"], square + facts["square"]
                self.progress(stop - start, name)
        return matrix, (gap / square) ** 0.5 if square else 0.0

    def _band(self, route: Route, start: int, stop: int, room: Tensor) -> tuple[Tensor, Document]:
        """Rows `start` to `stop` of the upper triangle, their square symmetric, in this room."""

        def summed() -> Tensor:
            rows, columns = stop - start, self.block.size - start
            upper = room[: rows * columns].view(rows, columns).zero_()
            route.sum([Rows(self.block, start, stop, upper)])
            return upper

        upper = fitting(route, summed)
        own = upper[:, : stop - start]
        facts = {"gap": 0.0, "square": 0.0}
        if route.symmetric:
            mirror_(own)
        else:
            facts = {"gap": average_(own), "square": float(wide(own).square().sum())}
        upper = upper.to(self.plan.problem.dtype)
        if upper.device.type == "cuda":  # which may still be at it
            torch.cuda.current_stream(upper.device).synchronize()
        return upper, facts
