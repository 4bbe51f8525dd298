"""How the entries of a weight lie in it: those of each output, by its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.layout import Part


@dataclass(frozen=True)
class Storage:
    """Of a weight [n, m], stored as [sections, runs, n / sections, m / runs]."""

    n: int  # outputs
    m: int  # inputs of each (fan-in); 1 for scale and bias
    groups: int = 1  # of outputs, each with inputs of its own
    sections: int = 1  # of outputs, whose entries lie one section after the other
    # How many runs of its section an output's entries lie in; 1 where they lie together.
    runs: int = 1
    # Which of its inputs each of an output's entries belongs to; empty where they follow one another.
    order: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.n * self.m

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.sections, self.runs, self.n // self.sections, self.m // self.runs

    def stored(self, values: Tensor) -> Tensor:
        """Of each output and input, [..., n, m], as the weight lies: [..., size]."""
        values = values.unflatten(-2, (self.sections, -1)).unflatten(-1, (self.runs, -1))
        return values.transpose(-3, -2).flatten(-4)

    @property
    def places(self) -> Tensor:
        """Where the entries of each output lie in the weight, in the order of its inputs: [n, m]."""
        return torch.arange(self.size).view(self.shape).transpose(1, 2).reshape(self.n, self.m)

    @property
    def owners(self) -> Tensor:
        """Of each entry, the output times m, and the place of its input: the inverse of `places`, [size]."""
        return self.places.flatten().argsort()

    def entries(self, values: Tensor, output: int) -> Tensor:
        """Those of one output, as a view: [size], as the weight lies, -> [runs, m / runs]."""
        section, place = divmod(output, self.n // self.sections)
        return values.view(self.shape)[section, :, place]

    def inputs_of(self, output: int) -> slice:
        """Which of the inputs of all groups, [groups m], an output is made of."""
        group = output * self.groups // self.n
        return slice(group * self.m, (group + 1) * self.m)

    def parts(self, first: int, sections: int) -> list[Part]:
        """Where an output's entries lie in a block in which the weight's start at `first`, for each section.

        There are as many as those of the weight that the outputs belong to.
        """
        starts = range(first, first + self.size, self.size // sections)
        return [Part(start, self.m, self.runs) for start in starts]
