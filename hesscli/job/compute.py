"""`hesscli compute`: the Hessian of a saved model, block by block, checked and written."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hesscli
from hesscli.errors import NumericalError, ResourceError
from hesscli.files.hessian_file import SCHEMA, HessianWriter
from hesscli.files.resources import available_memory, free_disk
from hesscli.hessian import check
from hesscli.hessian.blocks import STRUCTURES, Block, partition
from hesscli.hessian.check import Certificate
from hesscli.hessian.plan import group, output_bytes
from hesscli.hessian.problem import Problem
from hesscli.hessian.routes import NotApplicable, Route
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.symmetry import symmetrise_
from hesscli.job.opening import Opened, open_problem
from hesscli.job.options import ComputeOptions, Listener
from hesscli.job.writing import may_write
from hesscli.spectrum.statistics import Statistics, of_diagonal, of_matrix

Document = dict[str, Any]


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
    opened = open_problem(options, listener)
    job = _Job(options, opened, listener)
    if dry_run:
        document = job.plan()
    else:
        job.fits()
        document = job.run()
    document["seconds"] = time.perf_counter() - started
    document["output"] = str(options.output) if options.output else "-"
    return document


@dataclass(frozen=True)
class _Finished:
    """One block, ready to be written."""

    block: Block
    values: np.ndarray
    facts: Document


class _Job:
    def __init__(self, options: ComputeOptions, opened: Opened, listener: Listener) -> None:
        self.options = options
        self.opened = opened
        self.listener = listener
        self.problem = opened.problem
        self.structure = STRUCTURES[options.blocks]
        self.diagonal = self.structure == "elements"
        self.shapes = {name: tuple(p.shape) for name, p in self.problem.parameters.items()}
        self.blocks = partition(self.shapes, self.structure)
        self.dtype = str(self.problem.dtype).removeprefix("torch.")
        self.bytes = output_bytes(self.blocks, self.diagonal, self.problem.dtype)
        self.double: Problem | None = None
        if options.check or options.method != "hvp":
            self.double = self.problem.double()
        self.routes = self._routes()
        self.certificate = (
            Certificate(self.double or self.problem, self.problem.dtype, options.seed)
            if options.check
            else None
        )

    # What it takes

    def plan(self) -> Document:
        """The document of a dry run: blocks, method, bytes, memory, estimated seconds."""
        document = self._document()
        method = self.routes[0].name
        document["blocks"] = [
            self._facts(block) | {"method": method, "bytes": self._block_bytes(block)}
            for block in self.blocks
        ]
        document["total"] = {
            "size": sum(block.size for block in self.blocks),
            "bytes": self.bytes,
            "memory": self._memory(),
            "estimated_seconds": self._estimate(),
        }
        return document

    def fits(self) -> None:
        """Refuses what memory or disk cannot hold.

        Raises:
            ResourceError: with the command that would fit.
        """
        needed, free = self._memory(), available_memory()
        if needed > free:
            raise ResourceError(
                f"{self.structure} needs {_size(needed)} of memory for {self._dimensions()}, "
                f"{_size(free)} is free",
                self._smaller(free),
            )
        if self.options.output is not None:
            free = free_disk(self.options.output.parent)
            if self.bytes > free:
                raise ResourceError(
                    f"{self.structure} needs {_size(self.bytes)} of disk for {self._dimensions()}, "
                    f"{_size(free)} is free in {self.options.output.parent}",
                    self._smaller(free),
                )

    def _dimensions(self) -> str:
        largest = max(block.size for block in self.blocks)
        return f"a largest block of {largest} x {largest}" if len(self.blocks) > 1 else (
            f"{largest} x {largest} numbers"
        )

    def _smaller(self, free: int) -> str:
        for option in ("module", "diag", "elements"):
            structure = STRUCTURES[option]
            blocks = partition(self.shapes, structure)
            if output_bytes(blocks, option == "elements", self.problem.dtype) < min(free, self.bytes):
                break
        return f"hesscli compute {self.options.model} {self.options.data} --blocks {option}"

    def _memory(self) -> int:
        largest = max(output_bytes([b], self.diagonal, self.problem.dtype) for b in self.blocks)
        parameters = sum(math.prod(shape) for shape in self.shapes.values())
        return largest + 24 * parameters + (256 << 20)

    def _block_bytes(self, block: Block) -> int:
        return output_bytes([block], self.diagonal, self.problem.dtype)

    def _estimate(self) -> float:
        """Seconds, from the time of one gradient: a batched Hessian-vector product takes about twice as long."""
        self.problem.gradient(list(self.shapes))
        started = time.perf_counter()
        self.problem.gradient(list(self.shapes))
        gradient = time.perf_counter() - started
        rows = sum(block.size for block in self.blocks)
        return 2 * gradient * rows + self.bytes / 1e9

    # The work

    def _routes(self) -> list[Route]:
        hvp = HessianVectorProducts(self.problem, self.opened.sizes.chunk)
        difference = FiniteDifference(self.double or self.problem)
        return {"hvp": [hvp], "finite-difference": [difference]}.get(
            self.options.method, [hvp, difference]
        )

    def run(self) -> Document:
        """Computes, checks and writes every block."""
        gradient = self.problem.gradient(list(self.shapes))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        if not math.isfinite(norm):
            raise NumericalError(f"the gradient's norm is {norm}; the Hessian would mean nothing")
        document = self._document()
        document["gradient_norm"] = norm
        document["blocks"] = [self._facts(block) for block in self.blocks]
        shapes = self._tensors()
        with HessianWriter(self.options.output, shapes, self.dtype, document) as writer:
            if self.options.gradient:
                for name, g in gradient.items():
                    writer.write(f"gradient.{name}", g.cpu().numpy())
            finished = []
            for done in self._finished():
                writer.write(done.block.name, done.values)
                finished.append(done.facts)
            document["blocks"] = finished
            document["total"] = self._total(finished)
            document["method"] = _join(sorted({facts["method"] for facts in finished}))
            errors = [f["symmetry_error"] for f in finished if f["symmetry_error"] is not None]
            document["symmetry_error"] = max(errors, default=None)
            document["check"] = self._check_facts()
            document["notes"] = list(self.opened.notes)
            writer.commit(_timeless(document))
            if self.options.output is None:
                writer.copy_to(sys.stdout.buffer)
        return document

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        tensors: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            tensors[block.name] = (
                self.shapes[block.name] if self.diagonal else (block.size, block.size)
            )
        if self.options.gradient:
            for name, shape in self.shapes.items():
                tensors[f"gradient.{name}"] = shape
        return tensors

    def _finished(self) -> Iterator[_Finished]:
        total, done = sum(block.size for block in self.blocks), 0
        self.listener.progress(0, total, "")
        for blocks in group(self.blocks, self.diagonal):
            sums = self._sums(blocks)
            for block in blocks:
                yield self._finish(block, *sums.pop(block.name))
                done += block.size
                self.listener.progress(done, total, block.name)

    def _sums(self, blocks: Sequence[Block]) -> dict[str, tuple[Tensor, int]]:
        """Each block's sum over batches, and the index of the route that gave it."""
        for index, route in enumerate(self.routes):
            try:
                sums = self._through(route, blocks)
            except NotApplicable as reason:
                if len(blocks) > 1:  # perhaps only some of them cannot be done
                    return {
                        name: result
                        for block in blocks
                        for name, result in self._sums([block]).items()
                    }
                if index + 1 == len(self.routes):
                    raise self._impossible(blocks[0], route, reason) from None
                self._note(f"{reason}; {self.routes[index + 1].name} for it")
            else:
                return {name: (values, index) for name, values in sums.items()}
        raise AssertionError("there is always a route")

    def _through(self, route: Route, blocks: Sequence[Block]) -> dict[str, Tensor]:
        problem = getattr(route, "problem", self.problem)
        sums = {
            block.name: torch.zeros(
                (block.size,) if self.diagonal else (block.size, block.size),
                dtype=problem.dtype,
                device=problem.device,
            )
            for block in blocks
        }
        for batch in problem.batches:
            route.add(batch, blocks, sums, self.diagonal)
        return sums

    def _finish(self, block: Block, values: Tensor, index: int) -> _Finished:
        """Makes it symmetric, certifies it, or tries the next route."""
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"{block.name}: its Hessian is not finite (NaN or inf)",
                "--dtype float64, or look for a square root or norm at zero in the model",
            )
        symmetry = None if self.diagonal else symmetrise_(values)
        error = None
        if self.certificate is not None:
            judge = self.certificate.diagonal if self.diagonal else self.certificate.matrix
            error = judge(block, values)
            if not self.certificate.passed(error):
                return self._again(block, index, error)
            self.certificate.accept(error)
        array = values.to(self.problem.dtype).cpu().numpy()
        if self.diagonal:
            array = array.reshape(self.shapes[block.name])
        facts = self._facts(block) | {
            "method": self._method(index),
            **_statistics(array, self.diagonal, self.options.stats),
            "bytes": array.nbytes,
            "symmetry_error": symmetry,
            "check_error": error,
        }
        facts["unused"] = not array.any() and self._is_unused(block)
        if facts["unused"]:
            self._note(f"{block.name}: unused, its block is zero")
        return _Finished(block, array, facts)

    def _again(self, block: Block, index: int, error: float) -> _Finished:
        assert self.certificate is not None
        said = f"{block.name}: {self.routes[index].name} and gradients differ by {error:.1e}"
        if index + 1 == len(self.routes):
            raise NumericalError(
                f"{said}, more than {self.certificate.tolerance:.0e}; nothing was written",
                "--dtype float64" if self.problem.dtype == torch.float32 else "--no-check",
            )
        self._note(f"{said}; {self.routes[index + 1].name} instead")
        values = self._through(self.routes[index + 1], [block])[block.name]
        return self._finish(block, values, index + 1)

    def _impossible(self, block: Block, route: Route, reason: Exception) -> NumericalError:
        others = [m for m in ("finite-difference",) if m != route.name]
        return NumericalError(
            f"{block.name}: {route.name} cannot be exact here: {reason}",
            f"--method {others[0]}" if others else None,
        )

    def _method(self, index: int) -> str:
        return self.routes[index].name

    def _is_unused(self, block: Block) -> bool:
        gradient = self.problem.gradient(block.parameters)
        return not any(bool(g.any()) for g in gradient.values())

    def _note(self, text: str) -> None:
        if text not in self.opened.notes:
            self.opened.notes.append(text)
            self.listener.note(text)

    # The document

    def _document(self) -> Document:
        offset, parameters = 0, []
        for name, shape in self.shapes.items():
            parameters.append({"name": name, "shape": list(shape), "offset": offset})
            if name in self.opened.tied:
                parameters[-1]["tied"] = self.opened.tied[name]
            offset += math.prod(shape)
        return {
            "schema": SCHEMA,
            "versions": {
                "hesscli": hesscli.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            **self.opened.facts,
            "structure": self.structure,
            "dtype": self.dtype,
            "device": self.problem.device.type,
            "parameters": parameters,
            "frozen": self.opened.frozen,
            "notes": list(self.opened.notes),
        }

    def _facts(self, block: Block) -> Document:
        shape = self.shapes.get(block.name, (block.size,))
        return {"name": block.name, "shape": list(shape), "size": block.size}

    def _total(self, blocks: Sequence[Document]) -> Document:
        def known(key: str) -> list[float]:
            values = [facts[key] for facts in blocks]
            return [] if None in values else values

        squares = [norm**2 for norm in known("fro_norm")]
        return {
            "size": sum(facts["size"] for facts in blocks),
            "trace": sum(known("trace")) if known("trace") else None,
            "eig_max": max(known("eig_max"), default=None),
            "eig_min": min(known("eig_min"), default=None),
            "fro_norm": math.sqrt(sum(squares)) if squares else None,
            "bytes": self.bytes,
        }

    def _check_facts(self) -> Document | None:
        c = self.certificate
        if c is None:
            return None
        return {
            "kind": check.KIND,
            "dtype": str(c.problem.dtype).removeprefix("torch."),
            "directions": c.directions,
            "relative_error": c.worst,
            "tolerance": c.tolerance,
        }


def _statistics(array: np.ndarray, diagonal: bool, level: str) -> Document:
    if level == "none":
        return dict.fromkeys(("trace", "eig_max", "eig_min", "fro_norm"))
    found: Statistics = of_diagonal(array) if diagonal else of_matrix(array, level)
    return {
        "trace": found.trace,
        "eig_max": found.eig_max,
        "eig_min": found.eig_min,
        "fro_norm": found.fro_norm,
    }


def _timeless(document: Document) -> Document:
    """The document as it goes into the file: the same command gives the same bytes, so no times and no paths."""
    kept = dict(document)
    for part in ("model", "data"):
        kept[part] = {key: value for key, value in document[part].items() if key != "path"}
    return kept


def _join(methods: Sequence[str]) -> str:
    return " + ".join(methods)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
