"""Blocks of parameters that enter through weights which the model makes of them: w = w(theta), whatever the data.

With J = dw/dtheta, by the chain rule,

    d^2 L / dtheta^2 = J^T (d^2 L / dw^2) J + sum_k (dL/dw_k) d^2 w_k / dtheta^2.

The weights' own block comes from a route by affine uses; J and the second term take no pass over the data. Gauss-Newton
and Fisher matrices have the first term alone. Where each neuron's weights are made of entries of its own, J and the
second term have a block for every neuron: the diagonal then takes the square of each neuron alone, and one direction
serves all neurons at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.autodiff import batched_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, grouped, ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.proofs.weights import Neurons
from hesscli.hessian.routes.affine import AffineRoute, other_path
from hesscli.hessian.routes.base import Choice, Diagonal, Route, Rows, Wanted
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sums import add_product
from hesscli.hessian.symmetry import mirror_

_THROUGH_WEIGHTS = ", through weights"
Ways = Callable[[Block, Block], "_Way"]  # from a block of parameters to that of their weights
_ROWS = 8192  # of a block that is held whole; of its weights' there may be twice as many
_SQUARES = 1 << 26  # numbers in the squares of some neurons
_TOGETHER = 1 << 24  # and in the weights' own blocks, that share passes


def _numbers_held(block: Block, made: Block, neurons: Neurons | None) -> int:
    """How many numbers are held beside a block of parameters, or beside its diagonal: not too many."""
    if neurons is not None and neurons.use.m**2 <= _SQUARES:
        return min(_SQUARES, neurons.use.n * neurons.use.m**2)
    if neurons is not None or block.size > _ROWS or made.size > 2 * _ROWS:
        raise NotApplicable("more weights than are held together")
    return made.size**2 + made.size * block.size + block.size**2


class ThroughWeights(Route):
    """By a route to the weights' own blocks, of this kind."""

    symmetric, at_once = True, True

    def __init__(self, kind: type[AffineRoute], cuts: Cuts) -> None:
        super().__init__(cuts.problem)
        self.kind, self.cuts, self.method = kind, cuts, kind.method

    @property
    def name(self) -> str:
        return self.method + _THROUGH_WEIGHTS

    @cached_property
    def route(self) -> AffineRoute:
        """To the weights' own blocks."""
        return self.kind(self.cuts.behind_weights)

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        analysis, costs = first.proven()
        made = analysis.weights_of(block)
        neurons = analysis.neurons_of(block, made) if diagonal else None
        held = _numbers_held(block, made, neurons)
        choice = self.route.choice(first.behind_weights, made, neurons is not None)
        work = first.in_all(costs.through(analysis.weights, block, made, neurons))
        reason, own = choice.reason + _THROUGH_WEIGHTS, choice.own + work
        return replace(choice, route=self, reason=reason, own=own, held=held + choice.held)

    def shrink(self) -> bool:
        return self.route.shrink()

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        analysis = self.cuts.analyses.of(batch)
        whole: dict[Block, list[Wanted]] = {}
        by_neuron: dict[Block, list[tuple[Diagonal, Neurons]]] = {}
        for part in parts:
            made, neurons = analysis.weights_of(part.block), None
            if isinstance(part, Diagonal):
                neurons = analysis.neurons_of(part.block, made)
            _numbers_held(part.block, made, neurons)
            if isinstance(part, Diagonal) and neurons is not None:
                by_neuron.setdefault(made, []).append((part, neurons))
            else:
                whole.setdefault(made, []).append(part)
        way = self._ways(batch, [part.block for part in parts], [*whole, *by_neuron])
        self._add_whole(batch, whole, way)
        self._add_by_neuron(batch, by_neuron, way)

    def _add_whole(self, batch: Batch, wanted: Mapping[Block, Sequence[Wanted]], way: Ways) -> None:
        for some in grouped(wanted, lambda made: made.size**2, _TOGETHER):
            owns = [Rows.of(made, self.like) for made in some]
            self.route.add(batch, owns)
            self.route.multiply(owns)
            for made, own in zip(some, owns, strict=True):
                mirror_(own.out)
                h = self.route.layout(made).ordered(own.out)
                for part in wanted[made]:
                    part.add(0, way(part.block, made).block(h))

    def _add_by_neuron(
        self,
        batch: Batch,
        wanted: Mapping[Block, Sequence[tuple[Diagonal, Neurons]]],
        way: Ways,
    ) -> None:
        every = [
            (made, neurons.use, some)
            for made, ((_, neurons), *_) in wanted.items()
            for some in ranges(neurons.use.n, _SQUARES // neurons.use.m**2)
        ]
        for some in grouped(every, lambda each: len(each[2]) * each[1].m ** 2, _SQUARES):
            squares = [
                Squares.of_neurons(made, use, self.like, neurons) for made, use, neurons in some
            ]
            self.route.add(batch, squares)
            for each in squares:
                for part, _ in wanted[each.block]:
                    part.out.add_(way(part.block, each.block).diagonal(each))
        for made, parts in wanted.items():
            for part, neurons in parts:
                part.out.add_(way(part.block, made).bent_diagonal(neurons.entries))

    def _ways(self, batch: Batch, blocks: Sequence[Block], mades: Sequence[Block]) -> Ways:
        """From the parameters of a block to the weights they make, which must be those of the first batch."""
        weights, first = self.cuts.analyses.of(batch).weights, self.route.problem.parameters
        known = weights.values
        names = list(dict.fromkeys(name for made in mades for name in made.parameters))
        if not all(n in first and torch.equal(first[n], known[n]) for n in names):
            raise other_path()
        parameters = {n: self.problem.parameters[n] for block in blocks for n in block.parameters}
        theta = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        deltas: dict[str, Tensor] = {}
        if self.route.curved:
            probed = Probed(self.route.analyses, batch, [], leaves=names)
            leaves = list(probed.leaves.values())
            found = torch.autograd.grad(probed.value, leaves, materialize_grads=True)
            deltas = dict(zip(names, found, strict=True))
        made = dict(zip(names, weights.made_of(theta, names), strict=True))

        def way(block: Block, of: Block) -> _Way:
            delta = _flat(deltas[name] for name in of.parameters) if deltas else None
            w = _flat(made[name] for name in of.parameters)
            return _Way([theta[name] for name in block.parameters], w, delta)

        return way


@dataclass(frozen=True)
class _Way:
    """How weights depend on the parameters of a block that they are made of."""

    theta: list[Tensor]  # the parameters
    w: Tensor  # the weights, one after the other, with their graph; without one where all are detached, or masks
    delta: Tensor | None  # dL/dw; None where the matrix has no second term

    @cached_property
    def slope(self) -> Tensor | None:
        """(dL/dw) J, as a function of theta, with its graph; None where there is no second term."""
        if self.delta is None or not self.w.requires_grad:
            return None
        value = self.w @ self.delta
        grads = torch.autograd.grad(value, self.theta, create_graph=True, materialize_grads=True)
        slope = _flat(grads)
        return slope if slope.requires_grad else None

    def block(self, own: Tensor) -> Tensor:
        """The block, by d^2 L / dw^2."""
        found = self._along(self.w, self._along(self.w, own).T)
        if self.slope is not None:
            units = torch.eye(len(found), dtype=found.dtype, device=found.device)
            found += self._along(self.slope, units)
        return found

    def diagonal(self, squares: Squares) -> Tensor:
        """The diagonal of the block's first term, as far as it is that of some neurons."""
        found = self.w.new_zeros(len(_flat(self.theta)))
        for inputs in self._chunks(squares.out.shape[1]):
            units = self._along(self.w, squares.units(inputs))
            found += (units * self._along(self.w, squares.rows(inputs))).sum(0)
        return found

    def bent_diagonal(self, entries: Tensor) -> Tensor:
        """That of the second term, where neurons are made of entries of their own, [n, entries]."""
        found = self.w.new_zeros(entries.numel())
        if self.slope is None:
            return found
        for some in self._chunks(entries.shape[1]):
            units = found.new_zeros(len(some), len(found))
            units.scatter_(1, entries[:, some.start : some.stop].T.to(found.device), 1)
            found += (units * self._along(self.slope, units)).sum(0)
        return found

    def _along(self, values: Tensor, rows: Tensor) -> Tensor:
        """rows @ d values / d theta; of w, rows @ J: [k, weights] -> [k, parameters]."""
        found = rows.new_zeros(len(rows), sum(leaf.numel() for leaf in self.theta))
        for some in self._chunks(len(rows) if values.requires_grad else 0):
            mine = slice(some.start, some.stop)
            found[mine] = batched_rows(values, self.theta, rows[mine])
        return found

    def _chunks(self, count: int) -> list[range]:
        """So many rows, in parts that one pass takes."""
        sizes = chunk_sizes(self.w.device)
        return ranges(count, min(sizes.rows, sizes.directions // (8 * len(self.w))))


def _flat(values: Iterable[Tensor]) -> Tensor:
    """All their entries, one after the other."""
    return torch.cat([value.reshape(-1) for value in values])


@dataclass(frozen=True)
class Squares(Diagonal):
    """Those of some neurons: `out` is [neurons, m, m], with a neuron's entries in the order of its inputs."""

    places: Tensor  # where the entries of each neuron of the weight lie in the block, [n, m]
    first: int  # the first of these neurons

    @property
    def own(self) -> Tensor:
        """Where the entries of these neurons lie."""
        return self.places[self.first : self.first + len(self.out)]

    def add(self, first: int, found: Tensor) -> None:
        places = self.places.flatten().argsort()[first : first + len(found)]
        places = places - self.first * self.places.shape[1]
        mine = (places >= 0) & (places < self.own.numel())
        places = places[mine]
        columns = self.own[places // self.places.shape[1]]
        self.out.flatten(0, 1).index_add_(0, places, found[mine].gather(1, columns))

    def neurons(self, use: Use) -> range:
        return range(self.first, self.first + len(self.out))

    def add_neuron(self, use: Use, p: int, left: Tensor, right: Tensor) -> None:
        add_product(self.out[p - self.first], left.T, right)

    def add_weighted(self, use: Use, d: Tensor, a: Tensor) -> None:
        for p in self.neurons(use):
            self.add_neuron(use, p, a * d[:, p : p + 1], a)

    def add_pairs(self, left: Tensor, right: Tensor) -> None:
        for out, mine in zip(self.out, self.own, strict=True):
            add_product(out, left[:, mine].T, right[:, mine])

    def rows(self, inputs: range) -> Tensor:
        """The rows of these inputs' entries of every neuron: [inputs, block.size]."""
        found = self.out.new_zeros(len(inputs), self.block.size)
        some = self.out[:, inputs.start : inputs.stop]
        found[:, self.own.flatten()] = some.transpose(0, 1).flatten(1)
        return found

    def units(self, inputs: range) -> Tensor:
        """The sum of the unit vectors of such an entry of every neuron: [inputs, block.size]."""
        found = self.out.new_zeros(len(inputs), self.block.size)
        return found.scatter_(1, self.own[:, inputs.start : inputs.stop].T, 1)

    @classmethod
    def of_neurons(cls, block: Block, use: Use, like: Tensor, neurons: range) -> Squares:
        """Those of some neurons, of the dtype and on the device of `like`."""
        out = like.new_zeros(len(neurons), use.m, use.m)
        return cls(block, out, use.storage.places.to(like.device), neurons.start)
