"""Blocks that are held whole: computed in groups that share passes, made symmetric, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.check import Certificate
from hesscli.hessian.routes.base import ByRows, Route, Rows, fitting
from hesscli.hessian.symmetry import symmetrise_
from hesscli.job import documents, statistics
from hesscli.job.json_form import Document
from hesscli.job.planning import Plan
from hesscli.job.remedies import not_finite
from hesscli.job.triangles import on_host

_SMALL = 1 << 22  # numbers that are always kept together


def groups(plan: Plan) -> Iterator[list[Block]]:
    """The blocks that are held whole, by the route that is first for them, as many as are held together."""
    whole = [block for block in plan.blocks if not plan.is_large(block)]
    for method in dict.fromkeys(plan.choices[block.name][0].method for block in whole):
        mine = [b for b in whole if plan.choices[b.name][0].method == method]
        yield from _group(mine, plan.diagonal)


def _group(blocks: Sequence[Block], diagonal: bool) -> list[list[Block]]:
    """Blocks that are computed together: as many as take little more memory than the largest alone."""

    def cost(block: Block) -> int:
        return block.size if diagonal else block.size**2

    limit = max(int(1.1 * max((cost(block) for block in blocks), default=0)), _SMALL)
    groups: list[list[Block]] = []
    held = 0
    for block in blocks:
        if not groups or held + cost(block) > limit:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += cost(block)
    return groups


class WholeBlocks:
    """Computes groups of blocks.

    Args:
        plan: they are part of.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def compute(self, blocks: Sequence[Block]) -> Iterator[tuple[Document, np.ndarray]]:
        """Every block's facts and values.

        Raises:
            NumericalError: no route is exact.
        """
        for block, values, place in self._computed(blocks, 0):
            yield self._finish(block, values, place)

    def _computed(self, blocks: Sequence[Block], place: int) -> Iterator[tuple[Block, Tensor, int]]:
        """Blocks with their values, and the place of the route that gave them among their choices."""
        route = self.plan.routes[self.plan.choices[blocks[0].name][place].method]
        try:
            sums = fitting(route, lambda: self._sums(route, blocks))
        except NotApplicable as reason:
            if len(blocks) > 1:  # perhaps only some of them cannot be done
                for block in blocks:
                    yield from self._computed([block], place)
                return
            self.plan.next_route(blocks[0], place, reason)
            yield from self._computed(blocks, place + 1)
            return
        for block in blocks:
            values = sums.pop(block.name)
            if not self.plan.diagonal:
                route.finish(values)
                values = route.layout(block).ordered(values)
            yield block, values, place

    def _sums(self, route: Route, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """The blocks' sums over batches."""
        like = next(iter(route.problem.parameters.values())).detach()
        if self.plan.diagonal:
            sums = {block.name: like.new_zeros(block.size) for block in blocks}
            route.sum_diagonal(blocks, sums)
            return sums
        rows = [Rows.whole(block, like) for block in blocks]
        route.sum(rows)
        return {part.block.name: part.out for part in rows}

    def _error(self, certificate: Certificate, route: Route, block: Block, values: Tensor) -> float:
        """The relative error of a block; if only the diagonal of its rows was kept, of a product with them too."""
        if not self.plan.diagonal:
            return certificate.matrix(block, values)
        error = certificate.diagonal(block, values)
        if isinstance(route, ByRows) and certificate.passed(error):
            error = max(error, certificate.product(block, partial(route.product, block)))
        return error

    def _finish(self, block: Block, values: Tensor, place: int) -> tuple[Document, np.ndarray]:
        """Makes a block symmetric and certifies it, or takes the next route."""
        plan, certificate = self.plan, self.plan.certificate
        method = plan.choices[block.name][place].method
        symmetry = None
        if not plan.diagonal:
            symmetry = 0.0 if plan.routes[method].symmetric else symmetrise_(values)
        error = None
        if certificate is not None and block.size:
            error = self._error(certificate, plan.routes[method], block, values)
        passed = certificate is None or error is None or certificate.passed(error)
        # What passed a comparison is finite.
        if (error is None or not passed) and not bool(torch.isfinite(values).all()):
            raise not_finite(f"{block.name}: its Hessian", plan.options, plan.problem.dtype)
        if certificate is not None and error is not None and not passed:
            plan.differs(block, place, error, certificate.tolerance)
            ((_, values, place),) = self._computed([block], place + 1)
            return self._finish(block, values, place)
        array = on_host(values.to(plan.problem.dtype)).numpy()
        if plan.diagonal:
            array = array.reshape(plan.shapes[block.name])
        return documents.block_facts(plan.opened, block) | {
            "method": method,
            **statistics.of_block(array, plan.diagonal, plan.options.stats),
            "bytes": array.nbytes,
            "symmetry_error": symmetry,
            "check_error": error,
        }, array
