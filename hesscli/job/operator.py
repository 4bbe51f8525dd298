"""The curvature of a saved model as an operator: opened, checked, and ready to multiply."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscli.errors import MismatchError, NumericalError, ResourceError, UsageError
from hesscli.files.malloc import release_at_once
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.objective.first_gradient import first_gradient
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import LinearMap
from hesscli.hessian.words import FINITE_DIFFERENCE, HVP
from hesscli.job import documents
from hesscli.job.json_form import Document
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.remedies import ANOTHER_SLOPE, more_digits, not_finite
from hesscli.job.setup.batches import free_memory
from hesscli.job.setup.opening import Opened
from hesscli.job.setup.processes import Processes
from hesscli.job.sizes import size
from hesscli.spectrum.finite import NotFinite
from hesscli.widest import wide

_LONG = 1 << 23  # bytes of a vector


@dataclass
class Operator:
    """A problem's curvature, as products."""

    opened: Opened  # its own problem makes all passes on this process; parts of it are opened again
    problem: Problem  # the same over all processes, which products, gradients and checks are of
    products: LinearMap  # multiplies vectors [P]
    method: str  # how
    gradient: Tensor  # dL / d theta [P]
    processes: Processes  # that have the data
    double: Problem | None  # in float64, for checks and differences; None if that does not run
    check: Document | None = None  # what the check found, as in the JSON document; None without one

    @property
    def size(self) -> int:
        """P."""
        return self.products.size

    def generator(self) -> torch.Generator:
        """Of random vectors, from the seed asked for."""
        return torch.Generator().manual_seed(self.opened.options.seed)

    @contextmanager
    def finite(self) -> Iterator[None]:
        """Inside, a product that is not finite is an error that says so."""
        try:
            yield
        except NotFinite:
            raise self.not_finite("a product") from None

    def not_finite(self, what: str) -> NumericalError:
        """The error that says so."""
        return not_finite(what, self.opened.options, self.problem.dtype)

    def parameter_facts(self) -> list[Document]:
        """Name, shape and size of each parameter, in the order of the rows."""
        return [
            {"name": name, "shape": list(p.shape), "size": p.numel()}
            for name, p in self.problem.parameters.items()
        ]

    def document(self, schema: str) -> Document:
        """What every command says of the model, the data and the curvature."""
        return documents.skeleton(self.opened, "full") | {
            "schema": schema,
            "method": self.method,
            "gradient_norm": float(torch.linalg.norm(wide(self.gradient))),
            "check": self.check,
            "size": self.size,
        }

    def restricted(self, name: str) -> Operator:
        """The own block of one parameter, checked too."""
        opened = replace(self.opened, problem=self.opened.problem.restricted([name]))
        return _checked_operator(
            opened,
            self.products.by_parameter(self.gradient)[name].reshape(-1),
            self.processes,
            self.double and self.double.restricted([name]),
        )

    def let_go(self) -> None:
        """Frees the graphs that products keep: it multiplies no more."""
        self.processes.let_go()
        count = self.products.count
        self.products = LinearMap(self.problem)
        self.products.count = count

    def room(self, dtype: torch.dtype | None = None) -> int:
        """How many vectors fit into the memory that is free, of this dtype or the problem's."""
        itemsize = (dtype or self.problem.dtype).itemsize
        return free_memory(self.problem.device) // (self.size * itemsize)

    def needs(
        self,
        vectors: int,
        what: str,
        fewer: Callable[[int], str | None] = lambda room: None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Refuses to hold more vectors than fit, of this dtype or the problem's.

        Args:
            fewer: the option with which they are no more than so many, if there is one.

        Raises:
            ResourceError: with that option, or the largest parameter that is small enough.
        """
        room, itemsize = self.room(dtype), (dtype or self.problem.dtype).itemsize
        if vectors > room:
            lengths = zip(self.products.sizes, self.products.names, strict=True)
            fitting = [pair for pair in lengths if 0 < vectors * pair[0] <= room * self.size]
            _, name = max(fitting, default=(0, None))
            own = name and f"--params {shlex.quote(glob.escape(name))}"
            raise ResourceError(
                f"{what} holds {vectors} vectors of {self.size} numbers, "
                f"{size(vectors * self.size * itemsize)}; "
                f"{size(free_memory(self.problem.device))} of memory is free",
                fewer(room) or own,
            )


def open_operator(
    options: ProblemOptions, listener: Listener, processes: Processes, lean: bool = False
) -> Operator:
    """Opens model and data, linearises, and checks a product along a random direction.

    Args:
        processes: that have the data.
        lean: many vectors will be held; where they are long, this process keeps no memory that was freed.
    """
    opened = processes.open(options, listener)
    problem = processes.problem(opened)
    if not any(p.numel() for p in problem.parameters.values()):
        raise MismatchError(f"every parameter is empty: {', '.join(problem.parameters)}")
    grads, _, _ = first_gradient(problem)
    gradient = torch.cat([g.reshape(-1) for g in grads.values()])
    if lean and gradient.nbytes >= _LONG:
        release_at_once(gradient.nbytes // 6)
    return _checked_operator(opened, gradient, processes)


def _checked_operator(
    opened: Opened, gradient: Tensor, processes: Processes, double: Problem | None = None
) -> Operator:
    """The operator by the method asked for, or by the first that gives what the check expects."""
    options, problem = opened.options, processes.problem(opened)
    _demand_products(options)
    double = double or (processes.double(opened) if options.check else None)
    methods: dict[str, Callable[[], LinearMap]] = {
        HVP: lambda: processes.products(problem, options.curvature, opened.passes.rows),
    }
    if options.curvature == "hessian":
        methods[FINITE_DIFFERENCE] = lambda: Differences(
            double or processes.double(opened) or problem
        )
    if options.method != "auto":
        methods = {options.method: methods[options.method]}
    certificate = None
    if options.check:
        certificate = processes.certificate(
            double or problem, problem.dtype, options.seed, options.curvature
        )
    reason = ""
    for method, make in methods.items():
        if reason:
            opened.listener.note(f"{reason}: {method} instead")
        try:
            made = Operator(opened, problem, make(), method, gradient, processes, double)
            made.check = _check(made, certificate)
            made.products.count = 0  # of what is asked for, not of the check
            return made
        except NotApplicable as error:
            reason = str(error)
    if certificate is not None and certificate.finds_another_slope(_whole(problem)):
        raise NumericalError(f"{reason}: {ANOTHER_SLOPE}")
    raise NumericalError(
        reason,
        more_digits(problem.dtype)
        or (f"--method {FINITE_DIFFERENCE}" if options.method == HVP else None),
    )


def _demand_products(options: ProblemOptions) -> None:
    """Refuses a method that makes no products, or none of this curvature."""
    if options.method not in ("auto", HVP, FINITE_DIFFERENCE):
        raise UsageError(
            f"products are made by {HVP} or {FINITE_DIFFERENCE}, not by {options.method}",
            f"--method {HVP}",
        )
    if options.method == FINITE_DIFFERENCE and options.curvature != "hessian":
        raise UsageError(f"{FINITE_DIFFERENCE} gives the Hessian alone", f"--method {HVP}")


def _whole(problem: Problem) -> Block:
    """All parameters' block."""
    (block,) = partition({name: p.shape for name, p in problem.parameters.items()}, "full")
    return block


def _check(made: Operator, certificate: Certificate | None) -> Document | None:
    """What the check of a product found, as in the JSON document; NotApplicable where the product is wrong."""
    if certificate is None:
        probe = torch.ones(made.size, dtype=made.problem.dtype, device=made.problem.device)
        if not bool(torch.isfinite(made.products(probe)).all()):
            raise made.not_finite("a product")
        return None
    difference, asymmetry = certificate.product(
        _whole(made.problem), lambda v: made.products(v.to(made.problem.dtype))
    )
    error = max(difference, asymmetry)
    if certificate.passed(error):
        return documents.check_facts(certificate, 1, error)
    if not math.isfinite(error):
        raise made.not_finite("a product")
    found = f"{made.method} differs from {certificate.kind}"
    if certificate.passed(difference):
        found = f"{made.method} is asymmetric"
        if made.method == FINITE_DIFFERENCE:
            found = f"the gradients are those of no function: {found}"
    raise NotApplicable(f"{found} by {error:.1e}, more than {certificate.tolerance:.0e}")
