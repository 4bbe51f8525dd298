"""Small blocks: computed in groups that share passes, and held whole to be made symmetric and checked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import grouped
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.routes.base import ByRows, Diagonal, Route, Rows, Wanted, fitting
from hesscli.hessian.symmetry import mirror_, symmetrise_
from hesscli.hessian.words import FINITE_DIFFERENCE
from hesscli.job import documents, statistics
from hesscli.job.json_form import Document
from hesscli.job.matrix.background import Background
from hesscli.job.matrix.planning import Advance, Plan
from hesscli.job.matrix.ranking import Ranking
from hesscli.job.matrix.triangles import on_host
from hesscli.job.matrix.unfinished import Unfinished
from hesscli.spectrum.statistics import norm_of

_SMALL = 1 << 22  # numbers that are always kept together


@dataclass
class Group:
    """Blocks of a plan that are computed together."""

    plan: Plan
    blocks: Sequence[Block]
    progress: Advance

    def __post_init__(self) -> None:
        self.part = ", ".join(block.name for block in self.blocks)

    def parts(self) -> list[tuple[str, float]]:
        """The name of what is computed together, and its share of the work."""
        return [(self.part, self.plan.work(self.blocks))]

    def contribute(self, unfinished: Unfinished, mine: Collection[str]) -> None:
        """Computes and writes the blocks, if that is for this process; another finishes the file."""
        if self.part in mine and self.part not in unfinished.finished:
            with Background(enabled=False) as background:
                self.compute(unfinished, background)

    def compute(self, unfinished: Unfinished, background: Background) -> list[Document]:
        """The facts of the blocks, which it computes, writes and checks, unless they are in the file already."""
        writer = unfinished.writer
        earlier = unfinished.finished.get(self.part)
        if earlier is not None and writer.holds(earlier["checksums"]):
            self.plan.opened.listener.note(*earlier["notes"])
            for facts in earlier["blocks"]:
                self.progress(facts["size"], facts["name"])
            return list(earlier["blocks"])
        found = []
        for facts, array in compute_blocks(self.plan, self.blocks):
            background.run(writer.write, facts["name"], array)
            norm = facts["fro_norm"]
            found.append(facts | {"norm": norm_of(array) if norm is None else norm})
            self.progress(facts["size"], facts["name"])

        def note() -> None:
            checksums = writer.checksums()
            unfinished.add(
                self.part,
                {
                    "blocks": found,
                    "notes": list(self.plan.opened.listener.notes),
                    "checksums": {block.name: checksums[block.name] for block in self.blocks},
                },
            )

        background.run(note)
        return found


def groups(plan: Plan) -> Iterator[list[Block]]:
    """The small blocks, by the route that is first for them, as many as are held together."""
    routes = [choice.route for choice in plan.first_choices(plan.small)]
    for route in dict.fromkeys(routes):
        mine = [b for b, its in zip(plan.small, routes, strict=True) if its == route]
        # As many as take little more memory than the largest alone.
        sizes = [block.entries(plan.diagonal) for block in mine]
        limit = max(int(1.1 * max(sizes)), _SMALL)
        yield from grouped(mine, lambda block: block.entries(plan.diagonal), limit)


def compute_blocks(plan: Plan, blocks: Sequence[Block]) -> Iterator[tuple[Document, np.ndarray]]:
    """The facts and values of every block."""
    yield from _computed([Ranking(plan, block) for block in blocks])


def _computed(rankings: Sequence[Ranking]) -> Iterator[tuple[Document, np.ndarray]]:
    """All blocks by the route that is first for them, or each by its next."""
    route, diagonal = rankings[0].route, rankings[0].plan.diagonal
    try:
        sums = fitting(route, lambda: _sums(route, [r.block for r in rankings], diagonal))
    except NotApplicable as reason:
        if len(rankings) > 1:  # perhaps only some of them cannot be done
            for ranking in rankings:
                yield from _computed([ranking])
            return
        rankings[0].refuse(reason)
        yield from _computed(rankings)
        return
    for ranking in rankings:
        found = _finished(ranking, sums.pop(ranking.block.name))
        if found is None:
            yield from _computed([ranking])
        else:
            yield found


def _sums(route: Route, blocks: Sequence[Block], diagonal: bool) -> dict[str, Tensor]:
    """The blocks' sums over batches, or those of their diagonals."""
    kind = Diagonal if diagonal else Rows
    parts: list[Wanted] = [kind.of(block, route.like) for block in blocks]
    route.sum(parts)
    return {part.block.name: part.out for part in parts}


def _finished(ranking: Ranking, values: Tensor) -> tuple[Document, np.ndarray] | None:
    """A block, made symmetric and certified; None if it does not pass."""
    plan, block, route = ranking.plan, ranking.block, ranking.route
    method, symmetry, error = ranking.method, None, None
    if not plan.diagonal:
        if route.symmetric:
            mirror_(values)
        values = route.layout(block).ordered(values)
        symmetry = 0.0 if route.symmetric else symmetrise_(values)
    if plan.certificate is not None and block.size:
        error = _error(ranking, plan.certificate, values)
    narrow = values.to(plan.problem.dtype)

    def finite() -> bool:
        return bool(torch.isfinite(narrow).all())

    # Differences are in float64, and what they are in float32 may be infinite.
    if not ranking.accepts(error if narrow is values or finite() else None, finite):
        return None
    array = on_host(narrow).numpy()
    if plan.diagonal:
        array = array.reshape(plan.shapes[block.name])
    return documents.block_facts(plan.opened, block) | {
        "method": method,
        **statistics.of_block(array, plan.diagonal, plan.options.stats),
        "bytes": array.nbytes,
        "symmetry_error": symmetry,
        "check_error": error,
    }, array


def _error(ranking: Ranking, certificate: Certificate, values: Tensor) -> float:
    """The relative error of a block; if only the diagonal of its rows was kept, of products with them too.

    Rows of differences are not made again: that these are symmetric says as much.
    """
    block, route = ranking.block, ranking.route
    if not ranking.plan.diagonal:
        return certificate.matrix(block, values)
    error = certificate.diagonal(block, values)
    if isinstance(route, ByRows) and certificate.passed(error):
        error = max(error, *certificate.product(block, partial(route.product, block)))
    if route.method == FINITE_DIFFERENCE and certificate.passed(error):
        differences = Differences(certificate.problem.restricted(block.parameters))
        error = max(error, certificate.asymmetry(block, differences))
    return error
