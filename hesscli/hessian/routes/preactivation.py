"""Derivatives along the pre-activations z of affine layers instead of along their parameters.

With z = W a at a layer and delta = dL/dz, in each sample (samples do not mix, so one direction serves all of them at
once),

    H[(k,p,q), (l,i,j)] = sum_b a_k[q] ( S_l[i;p] a_l[j] + delta_l[i] a'_l[j;p] )

where S_l and a'_l are the derivatives of delta_l and a_l along z_k,p. For a layer's own block a' is zero. A layer has
as many directions as neurons (times positions, where it is shared over them), not as many as parameters. A layer that
enters at several values has them at each; see `assembly.py`.

Source: C. Bishop, Exact calculation of the Hessian matrix for the multilayer perceptron, 1992; here on any graph.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from hesscli.hessian.autodiff import as_rows, unit_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, shared_ranges
from hesscli.hessian.layout import Layout
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import BIAS, Use
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.assembly import add_layer, add_layer_diagonal
from hesscli.hessian.routes.base import Choice, Diagonal, Rows, Wanted
from hesscli.hessian.routes.costs import Costs, Work
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.layers import Layer, Layers, layers_of
from hesscli.hessian.routes.probes import Cut, Probed, passes
from hesscli.hessian.routes.sweep import add_chain_diagonals, choice_along_chain
from hesscli.hessian.words import PREACTIVATION
from hesscli.hessian.workers import each_with, share_of_time


class Preactivation(AffineRoute):
    """sum_b A^T S A by derivatives along z; H of several layers by the formula above."""

    method = PREACTIVATION

    def __init__(self, cuts: Cuts) -> None:
        super().__init__(cuts)
        self.workspace = chunk_sizes(self.problem.device).directions

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        analysis, costs = first.proven()
        if diagonal and (chosen := choice_along_chain(self, first, block)):
            return chosen
        parts = layers_of(analysis, block)
        layers = parts.every
        if not layers:
            use = analysis.use(block.parameters[0])
            work = self._directions(first, use, use.size) + costs.own(use, diagonal)
            held = costs.held_of_directions(
                use.z, 1, min(self.cuts.passes.rows, use.size), self.workspace
            )
            return self._choice(first, f"{use.size} seeds", use.size, work, held)
        work, seeds, held = Work(), 0, 0
        for index, layer in enumerate(layers):
            use = replace(layer.weight, positions=layer.positions)  # at all its values
            count = use.n * use.positions
            if parts.are_alone:
                work += self._directions(first, use, count)
            else:
                work += costs.directions(use.z, count)
            is_behind_itself = layer.is_shared and not diagonal
            behind = layers[index if is_behind_itself else index + 1 :]
            columns = sum(x.size for x in behind)
            made = sum(x.size * x.positions for x in behind)
            if is_behind_itself and self.curved:  # its inputs move as well, seen from each of them
                moving = use.m * use.positions
                work += costs.directions(use.z, moving // 2)
                work += costs.cross(moving, use.n, use, columns, made)
            else:
                work += costs.own(use, diagonal)
            if behind:
                work += costs.cross(count, use.m, use, columns, made)
            seeds += count
            held = max(held, self._held(costs, layers[index:]))
        rows = parts.firsts[0]
        if rows:
            work += costs.hvp(block.parameters, rows)
        said = f"{seeds} seeds" + (f", {rows} rows by hvp" if rows else "")
        return self._choice(first, said, seeds + rows, work, held)

    def _directions(self, first: FirstBatch, use: Use, count: int) -> Work:
        """So many directions of a layer that is alone."""
        return first.along(use, count)

    def _held(self, costs: Costs, layers: Sequence[Layer]) -> int:
        """Numbers that are held for the directions of the first of some layers, and the inputs of all."""
        layer, use = layers[0], layers[0].weight
        patches = costs.samples * sum(x.patches for x in layers)
        own = 0 if layer.plain else costs.samples * use.apart * layer.size
        inputs = 2 * sum(len(x.weights) for x in layers) - 1
        directions = costs.held_of_directions(use.z, inputs, use.n, self.workspace, own + patches)
        return directions + costs.samples * sum(
            x.positions * x.weight.apart * x.width for x in layers
        )

    def _choice(self, first: FirstBatch, said: str, seeds: int, work: Work, held: int) -> Choice:
        """That many seeds, the work of which is shared by threads."""
        share = share_of_time(self.cuts.graphs_for(seeds))
        return Choice(self, said, first.in_all(work).times(share), held=held)

    def shrink(self) -> bool:
        self.workspace //= 2
        return self.workspace >= 1 << 16

    def layout_in(self, analysis: Analysis, block: Block) -> Layout:
        return layers_of(analysis, block).layout

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        analysis = self._analysis(batch, [part.block for part in parts])
        diagonals = [part for part in parts if isinstance(part, Diagonal)]
        if diagonals:
            parts = add_chain_diagonals(self.analyses, batch, diagonals, self.curved)
        done: set[str] = set()
        for part in sorted(parts, key=lambda part: -part.block.size):  # weights before their biases
            block = part.block
            if block.name in done:
                continue
            layers = layers_of(analysis, block)
            if isinstance(part, Rows):
                self._demand_layout(analysis, block)
            if not layers.every:
                self._add_alone(batch, part)
                continue
            bias_out = None
            for other in parts if len(layers.every) == 1 else ():
                if _is_bias_at(analysis, layers.every[0], other.block):
                    # A bias that is a block of its own needs nothing but its weight's derivatives.
                    bias_out = other.out
                    done.add(other.block.name)
            if isinstance(part, Diagonal):
                self._add_diagonal(batch, part, layers, bias_out)
                continue
            self._firsts[block] = layers.firsts[0]
            if layers.firsts[0] > part.start:
                self._add_others(batch, part, layers.others)
            self._add_layers(batch, part, layers, bias_out)

    def _add_alone(self, batch: Batch, part: Wanted) -> None:
        """Rows of a parameter with no more entries than directions along z: u = A e_r for each entry r."""
        use = self.analyses.of(batch).use(part.block.parameters[0])
        count = self.cuts.graphs_for(part.stop - part.start)
        graphs = self._passes(count, batch, [use.z], cut=self._after(batch, use))
        first = graphs[0].deltas[use.z]
        if not first.requires_grad:
            return
        a, owners = graphs[0].inputs(use), use.storage.owners.tolist()

        def add(probed: Probed, entries: range) -> None:
            delta = probed.deltas[use.z]
            u = a.new_zeros(len(entries), probed.samples, use.positions, use.n)
            for row, entry in enumerate(entries):  # A e_r
                p, q = divmod(owners[entry], use.m)
                u[row, :, :, p] = a[:, :, use.storage.inputs_of(p)][:, :, q]
            seeds = use.spread(u, delta.shape)
            (found,) = probed.along(delta, [probed.probes[use.z]], seeds)
            if found is not None:
                rows = use.rows(found).flatten(1, 2).unsqueeze(0)
                part.add(entries.start, use.pull(rows, a.flatten(0, 1).unsqueeze(0))[0])

        most = min(self.cuts.passes.rows, self.workspace // (4 * first.numel()))
        each_with(graphs, shared_ranges(range(part.start, part.stop), most, len(graphs)), add)

    def _add_diagonal(
        self, batch: Batch, part: Diagonal, layers: Layers, bias: Tensor | None
    ) -> None:
        """The diagonal of a layer's weight; `bias` as in `add_layer`."""
        (layer,) = layers.every
        cut, neurons = self._cut(batch, layers), part.neurons(layer.weight)
        count = self.cuts.graphs_for(len(neurons) * layer.positions)
        graphs = self._passes(count, batch, layer.zs, [layer], cut)

        def add(probed: Probed, some: range) -> None:
            add_layer_diagonal(probed, layer, some, part, bias, self.workspace)

        each_with(graphs, shared_ranges(neurons, len(neurons), len(graphs)), add)

    def _cut(self, batch: Batch, layers: Layers) -> Cut | None:
        """The cut behind a layer that is alone."""
        return self._after(batch, layers.every[0].weight) if layers.are_alone else None

    def _after(self, batch: Batch, use: Use) -> Cut | None:
        """The next cut behind a use."""
        return self.cuts.after(batch, use, self.workspace)

    def _passes(
        self,
        count: int,
        batch: Batch,
        zs: Sequence[int],
        layers: Sequence[Layer] = (),
        cut: Cut | None = None,
    ) -> list[Probed]:
        """So many passes with probes at some values, and duals at what moves of some layers' operands."""
        moving = _moving(layers) if self.curved else ()
        return passes(count, self.analyses, batch, zs, moving, cut, not self.curved)

    def _add_layers(self, batch: Batch, part: Rows, every: Layers, bias: Tensor | None) -> None:
        """The rows of layers; `bias` as in `add_layer`."""
        cut, firsts = self._cut(batch, every), every.firsts
        left = sum(stop <= part.start for stop in firsts[1:])
        layers, firsts = every.every[left:], firsts[left:]
        pieces: list[tuple[int, range]] = []  # a layer's place, and some of its neurons
        for index, (layer, (at, stop)) in enumerate(
            zip(layers, itertools.pairwise(firsts), strict=True)
        ):
            rows = range(max(at, part.start), min(stop, part.stop))
            if rows:
                neurons = range((rows.start - at) // layer.width, (rows.stop - at) // layer.width)
                threads = self.cuts.graphs_for(len(neurons) * layer.positions)
                shares = _shares(neurons, part.block.size - at, layer.width, threads)
                pieces += [(index, some) for some in shares]
        seeds = sum(len(some) * layers[i].positions for i, some in pieces)
        zs = [z for layer in layers for z in layer.zs]
        count = self.cuts.graphs_for(seeds)
        graphs = self._passes(count, batch, zs, layers, cut)

        def add(probed: Probed, piece: tuple[int, range]) -> None:
            index, neurons = piece
            width = layers[index].width
            start, stop = (firsts[index] + p * width for p in (neurons.start, neurons.stop))
            own = None if bias is None else bias[neurons.start :, neurons.start :]
            out = part.upper(start, stop)
            add_layer(probed, layers[index:], neurons, out, own, self.workspace)

        each_with(graphs, pieces, add)

    def _add_others(self, batch: Batch, part: Rows, others: Mapping[str, range]) -> None:
        """Rows of parameters that are no part of a layer, by Hessian-vector products; they come first."""
        block = part.block
        wanted = {
            name: range(max(part.start, rows.start), min(rows.stop, part.stop))
            for name, rows in others.items()
            if rows.start < part.stop
        }
        count = self.cuts.graphs_for(sum(map(len, wanted.values())))
        graphs = []
        for _ in range(count):
            probed = Probed(self.analyses, batch, (), block.parameters, linearised=not self.curved)
            found = probed.derivatives([probed.leaves[name] for name in wanted])
            graphs.append((probed, dict(zip(wanted, found, strict=True))))
        activations = sum(x.numel() for x in graphs[0][0].known.values())
        most = min(self.cuts.passes.rows, self.workspace // (activations + block.size))

        def add(graph: tuple[Probed, dict[str, Tensor]], piece: tuple[str, range]) -> None:
            (probed, gradients), (name, some) = graph, piece
            gradient, leaves = gradients[name], list(probed.leaves.values())
            if gradient.requires_grad:
                first = some.start - others[name].start
                seeds = unit_rows(gradient, first, len(some), gradient.numel())
                seeds = seeds.view(len(some), *gradient.shape)
                rows = as_rows(probed.along(gradient, leaves, seeds), leaves, seeds)
                part.add(some.start, self.layout(block).from_block(rows))

        pieces = [
            (name, some)
            for name, rows in wanted.items()
            for some in shared_ranges(rows, most, count)
        ]
        each_with(graphs, pieces, add)


class LinearisedPreactivation(Preactivation):
    """sum_b A^T (V^T Lambda V) A by directions along z, forth and back through the model's tangent: the generalised
    Gauss-Newton matrix by as many passes as neurons, where `Jacobians` take as many as outputs.
    """

    curved = False

    def _directions(self, first: FirstBatch, use: Use, count: int) -> Work:
        _, costs = first.proven()
        return costs.directions(use.z, count)

    def _after(self, batch: Batch, use: Use) -> None:
        """None: what is kept at cuts is of the Hessian."""


def _shares(neurons: range, columns: int, width: int, count: int) -> list[range]:
    """Neurons in so many parts that take about as long: their directions are alike, their rows ever shorter.

    A row has the columns from its own on; directions are taken to cost half as much as all columns.
    """
    costs = list(itertools.accumulate(columns + columns // 2 - p * width for p in neurons))
    cuts = [1 + bisect_left(costs, costs[-1] * i / count) for i in range(1, count)]
    stops = [0, *cuts, len(neurons)]
    return [neurons[a:b] for a, b in itertools.pairwise(stops) if a < b]


def _is_bias_at(analysis: Analysis, layer: Layer, block: Block) -> bool:
    use = analysis.uses.get(block.name)
    return use is not None and use.kind == BIAS and [use.z] == layer.zs


def _moving(layers: Sequence[Layer]) -> set[int]:
    """The operands that move along directions of a layer: those of the layers behind, and its own if it is shared."""
    behind = [layer for index, layer in enumerate(layers) if index or layer.is_shared]
    moving = (use.moving for layer in behind for use in layer.weights)
    return {a for a in moving if a is not None}
