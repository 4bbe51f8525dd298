"""`hesscli compute`: the Hessian of a saved model, block by block, checked and written."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import NumericalError, ResourceError
from hesscli.files.hessian_file import HessianWriter
from hesscli.files.resources import available_memory, free_disk
from hesscli.hessian.blocks import STRUCTURES, Block, partition
from hesscli.hessian.check import Certificate
from hesscli.hessian.plan import group, output_bytes
from hesscli.hessian.planner import FINITE_DIFFERENCE, Choice, Planner, total
from hesscli.hessian.problem import Problem
from hesscli.hessian.rates import measure_rates
from hesscli.hessian.routes.all import routes
from hesscli.hessian.routes.base import NotApplicable, Route
from hesscli.hessian.symmetry import symmetrise_
from hesscli.job import document as documents
from hesscli.job.beside import Beside
from hesscli.job.document import Document
from hesscli.job.opening import Opened, open_problem
from hesscli.job.options import ComputeOptions, Listener
from hesscli.job.sizes import size
from hesscli.job.writing import may_write
from hesscli.spectrum.statistics import QUICK_LIMIT


def compute(options: ComputeOptions, listener: Listener, dry_run: bool = False) -> Document:
    """Computes the Hessian that the options ask for and writes it; with `dry_run`, only says what that takes.

    Returns:
        the JSON document.

    Raises:
        HesscliError: of any kind; nothing is written then.
    """
    started = time.perf_counter()
    if options.output is not None and not dry_run:
        may_write(options.output, options.force, (options.model, options.data))
    job = _Job(options, open_problem(options, listener), listener)
    if dry_run:
        document = job.dry_run()
    else:
        job.fits()
        document = job.run()
    document["seconds"] = time.perf_counter() - started
    document["output"] = str(options.output) if options.output else "-"
    return document


class _Job:
    def __init__(self, options: ComputeOptions, opened: Opened, listener: Listener) -> None:
        self.options, self.opened, self.listener = options, opened, listener
        self.problem = opened.problem
        self.structure = STRUCTURES[options.blocks]
        self.diagonal = self.structure == "elements"
        self.shapes = {name: tuple(p.shape) for name, p in self.problem.parameters.items()}
        self.blocks = partition(self.shapes, self.structure)
        self.bytes = output_bytes(self.blocks, self.diagonal, self.problem.dtype)
        self.double: Problem | None = None
        self.routes: dict[str, Route] = {}
        self.choices: dict[str, list[Choice]] = {}
        self.certificate: Certificate | None = None

    def plan(self) -> None:
        """Settles the routes of every block.

        Raises:
            NumericalError: the method asked for would not be exact.
        """
        self.double = self.problem.double()
        self.routes, analyses = routes(self.problem, self.double, self.opened.sizes.chunk)
        planner = Planner(self.problem, analyses, self.opened.sizes.chunk)
        method = self.options.method
        for block in self.blocks:
            try:
                self.choices[block.name] = (
                    planner.choices(block, self.diagonal)
                    if method == "auto"
                    else planner.forced(block, self.diagonal, method)
                )
            except NotApplicable as reason:
                raise self._inexact(block, method, reason) from None
        if planner.refused and method == "auto":
            self._note(f"no fast route: {planner.refused}; hvp takes one pass per parameter")

    # What it takes

    def dry_run(self) -> Document:
        """The document that says what the command would take."""
        self.plan()
        document = documents.skeleton(self.opened, self.structure)
        chosen = [self.choices[block.name][0] for block in self.blocks]
        document["blocks"] = [
            self._facts(block)
            | {
                "method": choice.method,
                "reason": choice.reason,
                "plan": str(choice),
                "bytes": output_bytes([block], self.diagonal, self.problem.dtype),
            }
            for block, choice in zip(self.blocks, chosen, strict=True)
        ]
        rates = measure_rates(self.problem)
        document["total"] = {
            "size": sum(block.size for block in self.blocks),
            "bytes": self.bytes,
            "memory": self._memory(),
            "estimated_seconds": self._estimate(total(chosen).seconds(rates)),
        }
        return document

    def _estimate(self, work: float) -> float:
        """Seconds of everything: the work, the check of each block, its eigenvalues, and writing."""
        reference = self.double or self.problem
        names = list(self.shapes)
        reference.gradient(names)  # the first one is slower
        started = time.perf_counter()
        reference.gradient(names)
        gradient = time.perf_counter() - started
        checks = 2 * gradient * len(self.blocks) if self.options.check else 0.0
        small = [b.size for b in self.blocks if not self.diagonal and b.size <= QUICK_LIMIT]
        eigenvalues = sum(2 * n**3 for n in small) / 1e10
        return 0.3 + work + checks + eigenvalues + self.bytes / 1e9

    def fits(self) -> None:
        """Refuses what memory or disk cannot hold.

        Raises:
            ResourceError: with the command that would fit.
        """
        output = self.options.output
        needs = [(self._memory(), available_memory(), "of memory", "is free")]
        if output is not None:
            needs.append(
                (self.bytes, free_disk(output.parent), "of disk", f"is free in {output.parent}")
            )
        for needed, free, kind, where in needs:
            if needed > free:
                largest = max(block.size for block in self.blocks)
                raise ResourceError(
                    f"{self.structure} needs {size(needed)} {kind} (its largest block is "
                    f"{largest} x {largest}), {size(free)} {where}",
                    self._smaller(free),
                )

    def _smaller(self, free: int) -> str:
        for option in ("module", "diag", "elements"):
            diagonal = option == "elements"
            blocks = partition(self.shapes, STRUCTURES[option])
            size = output_bytes(blocks, diagonal, self.problem.dtype)
            if size < self.bytes and size < free:
                break
        return f"--blocks {option}"

    def _memory(self) -> int:
        largest = max(output_bytes([b], self.diagonal, self.problem.dtype) for b in self.blocks)
        parameters = sum(math.prod(shape) for shape in self.shapes.values())
        return largest + 24 * parameters + (256 << 20)

    # The work

    def run(self) -> Document:
        """Computes, checks and writes every block."""
        self.plan()
        if self.options.check:
            reference = self.double or self.problem
            self.certificate = Certificate(reference, self.problem.dtype, self.options.seed)
        gradient = self.problem.gradient(list(self.shapes))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if not math.isfinite(norm):
            raise NumericalError(f"the gradient's norm is {norm}; the Hessian would mean nothing")
        document = documents.skeleton(self.opened, self.structure) | {"gradient_norm": norm}
        document["blocks"] = [self._facts(block) for block in self.blocks]
        dtype = str(self.problem.dtype).removeprefix("torch.")
        with HessianWriter(self.options.output, self._tensors(), dtype, document) as writer:
            if self.options.gradient:
                for name, g in gradient.items():
                    writer.write(f"gradient.{name}", g.cpu().numpy())
            finished = {}
            with Beside(enabled=self.problem.device.type != "cpu") as beside:
                for facts, array in self._finished(gradient):
                    beside.run(writer.write, facts["name"], array)
                    finished[facts["name"]] = facts
            document |= self._results([finished[block.name] for block in self.blocks])
            writer.commit(documents.timeless(document))
            if self.options.output is None:
                writer.copy_to(sys.stdout.buffer)
        return document

    def _results(self, blocks: list[Document]) -> Document:
        errors = [
            facts["symmetry_error"] for facts in blocks if facts["symmetry_error"] is not None
        ]
        return {
            "blocks": blocks,
            "total": documents.total(blocks),
            "method": " + ".join(sorted({facts["method"] for facts in blocks})),
            "symmetry_error": max(errors, default=None),
            "check": documents.check_facts(self.certificate),
            "notes": list(self.opened.notes),
        }

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        tensors = {
            block.name: self.shapes[block.name] if self.diagonal else (block.size, block.size)
            for block in self.blocks
        }
        if self.options.gradient:
            tensors |= {f"gradient.{name}": shape for name, shape in self.shapes.items()}
        return tensors

    def _finished(self, gradient: dict[str, Tensor]) -> Iterator[tuple[Document, np.ndarray]]:
        """Every block's facts and values, route by route."""
        everything, done = sum(block.size for block in self.blocks), 0
        self.listener.progress(0, everything, "")
        for method in dict.fromkeys(self.choices[block.name][0].method for block in self.blocks):
            mine = [b for b in self.blocks if self.choices[b.name][0].method == method]
            for blocks in group(mine, self.diagonal):
                for block, values, place in self._computed(blocks, 0):
                    yield self._finish(block, values, place, gradient)
                    done += block.size
                    self.listener.progress(done, everything, block.name)

    def _computed(self, blocks: Sequence[Block], place: int) -> Iterator[tuple[Block, Tensor, int]]:
        """Blocks with their values, and the place of the route that gave them among their choices."""
        route = self.routes[self.choices[blocks[0].name][place].method]
        try:
            sums = self._sums(route, blocks)
        except NotApplicable as reason:
            if len(blocks) > 1:  # perhaps only some of them cannot be done
                for block in blocks:
                    yield from self._computed([block], place)
                return
            self._next_route(blocks[0], place, reason)
            yield from self._computed(blocks, place + 1)
            return
        for block in blocks:
            values = sums.pop(block.name)
            if not self.diagonal:
                route.finish(values)
            yield block, values, place

    def _sums(self, route: Route, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """The blocks' sums over batches; with smaller chunks where a device's memory runs out."""
        while True:
            try:
                sums = {
                    block.name: torch.zeros(
                        (block.size,) if self.diagonal else (block.size, block.size),
                        dtype=route.problem.dtype,
                        device=route.problem.device,
                    )
                    for block in blocks
                }
                for batch in route.problem.batches:
                    route.add(batch, blocks, sums, self.diagonal)
                return sums
            except torch.OutOfMemoryError:
                if not route.shrink():
                    raise
            # Outside the handler, which holds on to the failed pass.
            sums = {}
            torch.cuda.empty_cache()

    def _next_route(self, block: Block, place: int, reason: Exception) -> None:
        """Says that the next route of a block is taken, and why.

        Raises:
            NumericalError: there is none.
        """
        choices = self.choices[block.name]
        if place + 1 == len(choices):
            raise self._inexact(block, choices[place].method, reason)
        self._note(f"{reason}: {choices[place + 1].method} instead of {choices[place].method}")

    def _inexact(self, block: Block, method: str, reason: Exception) -> NumericalError:
        hint = FINITE_DIFFERENCE if self.options.method == "hvp" else "auto"
        return NumericalError(
            f"{block.name}: {method} is not exact here: {reason}",
            None if method == FINITE_DIFFERENCE else f"--method {hint}",
        )

    def _finish(
        self, block: Block, values: Tensor, place: int, gradient: dict[str, Tensor]
    ) -> tuple[Document, np.ndarray]:
        """Makes a block symmetric and certifies it, or takes the next route."""
        method = self.choices[block.name][place].method
        symmetry = None
        if not self.diagonal:
            symmetry = 0.0 if self.routes[method].symmetric else symmetrise_(values)
        error = None
        if self.certificate is not None and block.size:
            judge = self.certificate.diagonal if self.diagonal else self.certificate.matrix
            error = judge(block, values)
        passed = self.certificate is None or error is None or self.certificate.passed(error)
        # What passed a comparison is finite.
        if (error is None or not passed) and not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"{block.name}: its Hessian is not finite (NaN or inf)",
                "--dtype float64" if self.problem.dtype == torch.float32 else None,
            )
        if self.certificate is not None and error is not None:
            if not passed:
                return self._again(block, place, error, gradient)
            self.certificate.accept(error)
        array = _on_host(values.to(self.problem.dtype))
        if self.diagonal:
            array = array.reshape(self.shapes[block.name])
        facts = self._facts(block) | {
            "method": method,
            **documents.statistics(array, self.diagonal, self.options.stats),
            "bytes": array.nbytes,
            "symmetry_error": symmetry,
            "check_error": error,
        }
        if not any(bool(gradient[name].any()) for name in block.parameters) and not array.any():
            facts["unused"] = True
            self._note(f"{block.name}: unused, its block is zero")
        return facts, array

    def _again(
        self, block: Block, place: int, error: float, gradient: dict[str, Tensor]
    ) -> tuple[Document, np.ndarray]:
        assert self.certificate is not None
        choices = self.choices[block.name]
        said = f"{block.name}: {choices[place].method} differs from gradients by {error:.1e}"
        if place + 1 == len(choices):
            raise NumericalError(
                f"{said}, more than {self.certificate.tolerance:.0e}; nothing was written",
                "--dtype float64" if self.problem.dtype == torch.float32 else "--no-check",
            )
        self._note(f"{said}; {choices[place + 1].method} instead")
        ((_, values, place),) = self._computed([block], place + 1)
        return self._finish(block, values, place, gradient)

    def _facts(self, block: Block) -> Document:
        return documents.block_facts(self.opened, block)

    def _note(self, text: str) -> None:
        if text not in self.opened.notes:
            self.opened.notes.append(text)
            self.listener.note(text)


def _on_host(values: Tensor) -> np.ndarray:
    """A block in the host's memory; from a GPU by way of pinned memory, several times as fast."""
    if values.device.type == "cuda":
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return pinned.copy_(values).numpy()
    return values.cpu().numpy()
