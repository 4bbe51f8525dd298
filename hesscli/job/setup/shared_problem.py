"""A problem whose data lies on several processes: every sum over batches that it needs is a question to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import LinearMap

if TYPE_CHECKING:
    from hesscli.job.setup.many_processes import ManyProcesses


@dataclass(frozen=True)
class Gradient:
    """dL / d theta of some parameters."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """H v."""

    curvature: str


@dataclass(frozen=True)
class Quotient:
    """The product with a vector by differences: see `DirectionalDifference`, whose kinks are held if `held`."""

    block: Block
    step: float
    curvature: str
    held: bool
    by_original: bool


@dataclass(frozen=True)
class Question:
    """A question about every process's data; a tensor goes with it."""

    what: Gradient | Product | Quotient
    index: int  # which of the problems that were opened
    dtype: torch.dtype  # of that problem, or of its copy in float64
    parameters: tuple[str, ...]  # the problem's, where it is restricted
    shape: tuple[int, ...]  # of the tensor


@dataclass(frozen=True)
class SharedProblem(Problem):
    """A problem whose gradients are sums over the data of all processes."""

    _: KW_ONLY
    processes: ManyProcesses  # this process's
    index: int  # which of the problems that were opened

    runs_here: ClassVar[bool] = False

    @classmethod
    def of(cls, problem: Problem, processes: ManyProcesses, index: int) -> SharedProblem:
        plain = {f.name: getattr(problem, f.name) for f in fields(Problem)}
        return cls(**plain, processes=processes, index=index)

    def ask(self, what: Gradient | Product | Quotient, tensor: Tensor) -> Tensor:
        names, shape = tuple(self.parameters), tuple(tensor.shape)
        return self.processes.ask(Question(what, self.index, self.dtype, names, shape), tensor)

    def flat_gradient(self, names: Sequence[str]) -> Tensor:
        theta = torch.cat([leaf.detach().reshape(-1) for leaf in self.parameters.values()])
        return self.ask(Gradient(tuple(names)), theta)

    def gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        leaves = [self.parameters[name] for name in names]
        parts = self.flat_gradient(names).split([leaf.numel() for leaf in leaves])
        return {
            name: part.view_as(leaf) for name, part, leaf in zip(names, parts, leaves, strict=True)
        }

    def gradient_norm(self) -> float:
        """|dL/dtheta| over the chosen parameters: the others' are not shared."""
        return float(self.flat_gradient(list(self.parameters)).norm())

    def by_batch(self) -> Iterator[Problem]:
        return iter((self,))

    def double(self) -> Problem | None:
        copy = self.processes.in_float64(self.index)
        return copy and SharedProblem.of(
            copy.restricted(self.parameters), self.processes, self.index
        )


class SharedProducts(LinearMap):
    """v -> H v, the sum over the data of all processes."""

    problem: SharedProblem

    def __init__(self, problem: SharedProblem, curvature: str) -> None:
        super().__init__(problem)
        self.curvature = curvature

    def __call__(self, vectors: Tensor) -> Tensor:
        self.count += 1 if vectors.dim() == 1 else len(vectors)
        return self.problem.ask(Product(self.curvature), vectors)


@dataclass
class SharedDifference(DirectionalDifference):
    """Asks for what is not made of the problem's gradients: these are sums over all processes already."""

    problem: SharedProblem
    curvature: str

    def quotient(self, step: float) -> Tensor:
        return super().quotient(step) if self.curvature == "hessian" else self._ask(step)

    def one_sided_quotient(self, step: float) -> Tensor | None:
        return super().one_sided_quotient(step) if self.curvature == "hessian" else None

    def held_quotient(self, step: float, by_original: bool = False) -> Tensor | None:
        held = self._ask(step, held=True, by_original=by_original)
        return None if bool(held.isnan().any()) else held

    def _ask(self, step: float, held: bool = False, by_original: bool = False) -> Tensor:
        question = Quotient(self.block, step, self.curvature, held, by_original)
        return self.problem.ask(question, self.direction)
