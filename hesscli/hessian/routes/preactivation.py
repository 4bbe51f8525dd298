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
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from hesscli.hessian.autodiff import batched_rows, unit_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.layout import Layout, Part, Piece
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import BIAS, Use
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.assembly import add_layer, add_layer_diagonal
from hesscli.hessian.routes.base import Diagonal, Rows, Wanted
from hesscli.hessian.routes.chain import find_chain
from hesscli.hessian.routes.choice import Choice
from hesscli.hessian.routes.costs import Work
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.layers import Layer, split
from hesscli.hessian.routes.probes import Cut, Probed
from hesscli.hessian.routes.sweep import add_chain_diagonals
from hesscli.hessian.words import PREACTIVATION


class Preactivation(AffineRoute):
    """sum_b A^T S A by derivatives along z; H of several layers by the formula above."""

    method = PREACTIVATION

    def __init__(self, cuts: Cuts) -> None:
        super().__init__(cuts)
        self._layers: dict[Block, list[Layer]] = {}  # of the last batch, and the same in all
        self.sizes = chunk_sizes(self.problem.device)
        self.workspace = self.sizes.directions

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        analysis, costs = first.proven()
        if diagonal:
            steps, uses = find_chain(analysis, [block.name])
            if block.name in uses:
                own, sweep = costs.own(uses[block.name], diagonal), costs.chain(steps)
                return Choice(self, "chain", first.in_all(own), first.in_all(sweep))
        layers, others = split(analysis, block)
        if not layers:
            use = analysis.use(block.parameters[0])
            work = first.along(use, use.size) + costs.own(use, diagonal)
            return Choice(self, f"{use.size} seeds", first.in_all(work))
        alone, work, seeds, tail = _are_alone(layers, others), Work(), 0, 0
        for layer in reversed(layers):
            use = replace(layer.weight, positions=layer.positions)  # at all its values
            count = use.n * use.positions
            work += first.along(use, count) if alone else costs.directions(use.z, count)
            if layer.is_shared and not diagonal:  # the inputs move as well, seen from each of them
                work += costs.directions(use.z, use.m * use.positions // 2)
                work += costs.cross(use, layer.size)
            else:
                work += costs.own(use, diagonal)
            if tail:
                work += costs.cross(use, tail)
            tail += layer.size
            seeds += count
        rows = sum(len(block.rows[name]) for name in others)
        if rows:
            work += costs.hvp(block.parameters, rows)
        said = f"{seeds} seeds" + (f", {rows} rows by hvp" if rows else "")
        return Choice(self, said, first.in_all(work))

    def shrink(self) -> bool:
        self.workspace //= 2
        return self.workspace >= 1 << 16

    def layout_in(self, analysis: Analysis, block: Block) -> Layout:
        """First what is no part of a layer, whose rows have all columns; then layer by layer, neuron by neuron."""
        layers, others = split(analysis, block)
        pieces = [Piece(len(block.rows[x]), (Part(block.rows[x].start, 1),)) for x in others]
        pieces += [piece for layer in layers for piece in layer.pieces(block)]
        return Layout(tuple(pieces))

    def _by_use(self, block: Block) -> tuple[Sequence[str], int]:
        layers = self._layers.get(block)
        if not layers:
            return super()._by_use(block)
        # The rows of the others, which come first, are products with the parameters themselves.
        first = block.size - sum(layer.size for layer in layers)
        return [use.parameter for layer in layers for use in layer.uses], first

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        analysis = self._analysis(batch, [part.block for part in parts])
        diagonals = [part for part in parts if isinstance(part, Diagonal)]
        if diagonals:
            parts = add_chain_diagonals(self.analyses, batch, diagonals)
        done: set[str] = set()
        for part in sorted(parts, key=lambda part: -part.block.size):  # weights before their biases
            block = part.block
            if block.name in done:
                continue
            layers, others = split(analysis, block)
            self._layers[block] = layers
            if isinstance(part, Rows):
                self._demand_layout(analysis, block)
            if not layers:
                for first, found in self._alone(batch, part):
                    part.add(first, found)
                continue
            bias_out = None
            for other in parts if len(layers) == 1 else ():
                if _is_bias_at(analysis, layers[0], other.block):
                    # A bias that is a block of its own needs nothing but its weight's derivatives.
                    bias_out = other.out
                    done.add(other.block.name)
            if isinstance(part, Diagonal):
                self._add_diagonal(batch, part, layers[0], bias_out)
            else:
                self._add_layers(batch, part, layers, others, bias_out)

    def _alone(self, batch: Batch, part: Wanted) -> Iterator[tuple[int, Tensor]]:
        """Rows of a parameter with no more entries than directions along z: u = A e_r for each entry r.

        Yields:
            some rows [rows, block.size], with the first one's number.
        """
        use = self.analyses.of(batch).use(part.block.parameters[0])
        cut = self.cuts.after(batch, use, self.workspace)
        probed = Probed(self.analyses, batch, [use.z], cut=cut)
        probe = probed.probes[use.z]
        (delta,) = probed.derivatives([probe])
        if not delta.requires_grad:
            return
        a = probed.columns(use)
        chunk = min(self.sizes.rows // 2, self.workspace // (8 * delta.numel()))
        for entries in ranges(part.stop, chunk, part.start):
            seeds = use.spread(_directions_of(use, a, entries, probed.samples), delta.shape)
            (found,) = probed.along(delta, [probe], seeds)
            if found is None:
                return
            rows = use.rows(found).flatten(1, 2)
            yield entries.start, use.pull(rows.unsqueeze(0), a.flatten(0, 1).unsqueeze(0))[0]

    def _add_diagonal(
        self, batch: Batch, part: Diagonal, layer: Layer, bias: Tensor | None
    ) -> None:
        """The diagonal of a layer's weight; `bias` as in `add_layer`."""
        cut = self._cut(batch, [layer])
        probed = Probed(self.analyses, batch, layer.zs, activations=_moving([layer]), cut=cut)
        found = probed.derivatives([probed.probes[z] for z in layer.zs])
        deltas = dict(zip(layer.zs, found, strict=True))
        add_layer_diagonal(probed, layer, deltas, part, bias, self.workspace)

    def _cut(self, batch: Batch, layers: Sequence[Layer], others: Sequence[str] = ()) -> Cut | None:
        """The cut behind a layer that is alone."""
        if not _are_alone(layers, others):
            return None
        return self.cuts.after(batch, layers[0].weight, self.workspace)

    def _add_layers(
        self,
        batch: Batch,
        part: Rows,
        layers: Sequence[Layer],
        others: Sequence[str],
        bias: Tensor | None,
    ) -> None:
        """Rows of a block of layers, and of parameters that are no part of one; `bias` as in `add_layer`."""
        block, cut = part.block, self._cut(batch, layers, others)
        lengths = [*(len(block.rows[name]) for name in others), *(x.size for x in layers)]
        named = [*others, *(layer.weight.parameter for layer in layers)]
        first_rows = dict(zip(named, itertools.accumulate(lengths, initial=0), strict=False))
        layers = [x for x in layers if first_rows[x.weight.parameter] + x.size > part.start]
        zs = [z for layer in layers for z in layer.zs]
        probed = Probed(
            self.analyses,
            batch,
            zs,
            leaves=block.parameters if others else (),
            activations=_moving(layers),
            cut=cut,
        )
        with_rows = [x for x in probed.leaves if x in others and first_rows[x] < part.stop]
        wanted = [probed.probes[z] for z in zs] + [probed.leaves[name] for name in with_rows]
        found = probed.derivatives(wanted)
        deltas = dict(zip(zs, found, strict=False))
        for index, layer in enumerate(layers):
            at = first_rows[layer.weight.parameter]
            rows = range(max(at, part.start), min(at + layer.size, part.stop))
            if rows:
                neurons = range((rows.start - at) // layer.width, (rows.stop - at) // layer.width)
                out = part.upper(rows.start, rows.stop)
                add_layer(probed, layers[index:], deltas, neurons, out, bias, self.workspace)
        for name, gradient in zip(with_rows, found[len(zs) :], strict=True):
            if gradient.requires_grad:
                self._add_rows(probed, part, first_rows[name], gradient)

    def _add_rows(self, probed: Probed, part: Rows, at: int, gradient: Tensor) -> None:
        """Rows of a parameter that is no part of a layer, by Hessian-vector products; `at` is its first."""
        leaves, size = list(probed.leaves.values()), gradient.numel()
        activations = sum(x.numel() for x in probed.known.values())
        chunk = min(self.sizes.rows, self.workspace // (activations + part.block.size))
        last = min(size, part.stop - at)
        for some in ranges(last, chunk, max(0, part.start - at)):
            seeds = unit_rows(gradient, some.start, len(some), size)
            rows = batched_rows(gradient, leaves, seeds.view(len(some), *gradient.shape))
            part.add(at + some.start, self.layout(part.block).from_block(rows))


def _are_alone(layers: Sequence[Layer], others: Sequence[str]) -> bool:
    """Whether it is one layer, at one value, beside parameters of none: its directions end at the next cut."""
    return len(layers) == 1 and not layers[0].is_shared and not others


def _is_bias_at(analysis: Analysis, layer: Layer, block: Block) -> bool:
    use = analysis.uses.get(block.name)
    return use is not None and use.kind == BIAS and [use.z] == layer.zs


def _moving(layers: Sequence[Layer]) -> set[int]:
    """The operands that move along directions of a layer: those of the layers behind, and its own if it is shared."""
    behind = [layer for index, layer in enumerate(layers) if index or layer.is_shared]
    moving = (use.moving for layer in behind for use in layer.weights)
    return {a for a in moving if a is not None}


def _directions_of(use: Use, a: Tensor, entries: range, samples: int) -> Tensor:
    """A e_r for each of these entries r of the parameter: [entries, B, T, n]."""
    u = a.new_zeros(len(entries), samples, use.positions, use.n)
    for row, entry in enumerate(entries):
        p, q = use.storage.owner(entry)
        u[row, :, :, p] = a[:, :, use.storage.inputs_of(p)][:, :, q]
    return u
