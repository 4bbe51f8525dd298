"""The squares of a weight's neurons on the diagonal of its block: second derivatives by a neuron's own entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.base import Diagonal
from hesscli.hessian.routes.sums import add_product


@dataclass(frozen=True)
class Squares(Diagonal):
    """Those of some neurons: `out` is [neurons, m, m], with a neuron's entries in the order of its inputs.

    Attributes:
        places: where the entries of each neuron of the weight lie in the block, [n, m].
        first: the first of these neurons.
    """

    places: Tensor
    first: int

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
