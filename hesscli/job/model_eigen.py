"""`hesscli eigen MODEL DATA`: eigenvalues of a saved model's curvature, without its matrix."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from hesscli.files.malloc import release_memory
from hesscli.job.eigen import SCHEMA, EigenOptions
from hesscli.job.json_form import Document, timeless
from hesscli.job.operator import Operator, open_operator
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.results import writable, write_tensors
from hesscli.job.setup.processes import Processes
from hesscli.spectrum.dense import DENSE, HELD, dense
from hesscli.spectrum.eigen import LAPACK_LIMIT, WHICH, allowed
from hesscli.spectrum.lanczos import Found, Lanczos, Report

_BESIDE = 8  # vectors that a search holds, besides three for each eigenvalue


def model_eigen(
    problem: ProblemOptions,
    options: EigenOptions,
    listener: Listener,
    processes: Processes,
) -> Document:
    """The first eigenvalues of a model's curvature; or the extremes of each parameter's own block.

    `converged` is False where the products were spent, or Ctrl-C was pressed (`interrupted`).
    """
    started = time.perf_counter()
    if options.output is not None:
        file = writable(options.output, options.force, problem.files, name="eigen")
        options = replace(options, output=file)
    operator = open_operator(problem, listener, processes, lean=True)
    if options.per_block:
        found, blocks = _per_block(operator, options)
    else:
        found = search(operator, options)
        blocks = ["hessian"] * len(found.values)
    document = operator.document(SCHEMA) | {
        "which": "both" if options.per_block else options.which,
        "per_block": options.per_block,
        "block": None,
        "tolerance": options.tolerance,
        "eigenvalues": found.values.tolist(),
        "residuals": found.residuals.tolist(),
        "blocks": blocks,
        "converged": bool(found.converged.all()) and not found.interrupted,
        "interrupted": found.interrupted,
        "spent": found.spent,
        "products": operator.products.count,
    }
    output = options.output if document["converged"] else None
    if output is not None:
        tensors = {"eigenvalues": found.values, "eigenvectors": found.vectors.cpu().numpy()}
        write_tensors(output, tensors, "float64", timeless(document))
    document["seconds"] = time.perf_counter() - started
    document["output"] = None if output is None else str(output)
    return document


def reached(document: Document) -> str:
    """The tolerance, a power of ten, that a search which did not converge would have reached."""
    pairs = zip(document["eigenvalues"], document["residuals"], strict=True)
    worst = max((residual / abs(value) for value, residual in pairs if value), default=0.0)
    return f"1e{math.ceil(math.log10(2 * worst))}" if worst else "0"


def search(operator: Operator, options: EigenOptions) -> Found:
    """The first pairs, largest first if from both ends: of the whole matrix where it is small, else by Lanczos.

    A search that goes on until the products left are as many as the matrix has rows gives way to the matrix.
    """
    with operator.finite():
        found = _search(operator, options)
    if not found.copies_sought and found.converged.all():
        cause = "Ctrl-C" if found.interrupted else f"--max-products {options.max_products}"
        operator.opened.listener.note(
            f"{cause} ended the search for copies of repeated eigenvalues: some may be missing"
        )
    return found


def _search(operator: Operator, options: EigenOptions) -> Found:
    size, most = operator.size, options.max_products
    if size <= DENSE or 3 * options.top >= size:
        found = _dense(operator, options)
    else:
        affordable = size <= LAPACK_LIMIT and most - size >= size // 4
        affordable = affordable and operator.room(torch.float64) >= HELD * size
        limit = min(size, most - size) if affordable else most
        found = _lanczos(operator, options, limit)
        if affordable and found.spent and not found.interrupted:
            found = _dense(operator, options)
    return _descending(found) if options.which == "both" else found


def _dense(operator: Operator, options: EigenOptions) -> Found:
    """Those of the whole matrix."""
    size, most = operator.size, options.max_products
    if size > most:
        operator.opened.listener.note(
            f"--max-products {most} has no effect where the matrix is formed, by a product for each of its rows"
        )

    def fewer(room: int) -> str | None:
        """Of so few no matrix is made."""
        top = min(
            (size - 1) // 3, _top(room * torch.float64.itemsize // operator.problem.dtype.itemsize)
        )
        return f"--top {top}" if size > DENSE and top > 0 else None

    operator.needs(HELD * size, "the whole matrix", fewer, torch.float64)
    try:
        values, columns, errors = dense(
            operator.products.matrix_rows, size, operator.opened.listener.progress
        )
    except KeyboardInterrupt:
        return _interrupted(size)
    best = WHICH[options.which](values)[: options.top]
    largest = float(np.abs(values).max(initial=0.0))
    errors = errors[best]
    rounding = float(errors.max(initial=0.0))  # of products, and nothing else is left
    converged = errors <= allowed(values[best], options.tolerance, largest, rounding)
    vectors = torch.from_numpy(columns[:, best].T.copy())
    return Found(values[best], vectors, errors, converged, size)


def _top(room: int) -> int:
    """How many eigenvalues are sought with so many vectors."""
    return (room - _BESIDE) // 3


def _lanczos(operator: Operator, options: EigenOptions, max_products: int) -> Found:
    vectors, what = 3 * options.top + _BESIDE, f"--top {options.top}"
    operator.needs(vectors, what, lambda room: f"--top {top}" if (top := _top(room)) > 0 else None)
    release_memory()  # of the check
    lanczos = Lanczos(
        operator.products,
        operator.size,
        options.top,
        options.which,
        options.tolerance,
        operator.generator(),
        operator.gradient,  # mostly among the largest: Gur-Ari, Roberts and Dyer, arXiv:1812.04754
        reporting(operator.opened.listener, max_products),
    )
    return lanczos.run(max_products)


def reporting(listener: Listener, most: int) -> Report:
    """Tells how far the relative residual has come on its way to the tolerance: it falls about as its logarithm. Or,
    if that is further, how many of `most` products are done.
    """
    first = 0.0

    def report(products: int, worst: float, tolerance: float) -> None:
        nonlocal first
        tolerance = max(tolerance, sys.float_info.min)
        first = max(first, worst, tolerance)
        way = math.log(first / tolerance) or 1.0
        come = min(max(math.log(first / max(worst, tolerance)) / way, products / most), 0.99)
        listener.progress(int(1000 * come), 1000, f"{products} products, residual {worst:.1e}")

    return report


def _interrupted(size: int) -> Found:
    """Before anything was found."""
    return Found(
        np.zeros(0), torch.zeros(0, size), np.zeros(0), np.zeros(0, bool), 0, interrupted=True
    )


def _descending(found: Found) -> Found:
    order = np.argsort(-found.values, kind="stable")
    return replace(
        found,
        values=found.values[order],
        vectors=found.vectors[torch.from_numpy(order).to(found.vectors.device)],
        residuals=found.residuals[order],
        converged=found.converged[order],
    )


def _worst(checks: Sequence[Document]) -> Document | None:
    """What several checks found, as one."""
    if not checks:
        return None
    worst = max(checks, key=lambda check: check["relative_error"])
    return worst | {"directions": sum(check["directions"] for check in checks)}


def _per_block(operator: Operator, options: EigenOptions) -> tuple[Found, list[str]]:
    """The largest and the smallest eigenvalue of each parameter's own block, and whose each is."""
    parts: list[Found] = []
    blocks: list[str] = []
    operator.let_go()
    if options.output is not None:
        vectors = 2 * len(operator.products.names)
        operator.needs(vectors, "the file", dtype=torch.float64)
    for name, length in zip(operator.products.names, operator.products.sizes, strict=True):
        if not length:
            continue
        try:
            found = _extremes(operator, name, options)
        except KeyboardInterrupt:  # the blocks before this one are known
            found = _interrupted(length)
        parts.append(found)
        blocks += [name] * len(found.values)
        if found.interrupted:
            break
    written = parts if options.output is not None else []
    return (
        Found(
            np.concatenate([part.values for part in parts]),
            torch.block_diag(*(part.vectors.cpu().double() for part in written)),
            np.concatenate([part.residuals for part in parts]),
            np.concatenate(_converged(parts, options.tolerance)),
            sum(part.products for part in parts),
            parts[-1].interrupted,
            spent=any(part.spent and not part.converged.all() for part in parts),
        ),
        blocks,
    )


def _extremes(operator: Operator, name: str, options: EigenOptions) -> Found:
    """Those of one block, whose graphs give way to those of the next; its products and its check go to the whole's."""
    own = operator.restricted(name)
    operator.check = _worst([each.check for each in (operator, own) if each.check is not None])
    try:
        return search(own, replace(options, top=2, which="both"))
    finally:
        operator.products.count += own.products.count


def _converged(parts: Sequence[Found], tolerance: float) -> list[np.ndarray]:
    """Which pairs of each block have converged.

    A block may be zero but for rounding, as that of a key's bias is, which the softmax takes out again. No value of it
    has converged relative to its own largest one, but all have to that of all blocks, if all products were made.
    """
    largest = max((float(np.abs(part.values).max(initial=0.0)) for part in parts), default=0.0)
    return [
        part.converged | (part.residuals <= allowed(part.values, tolerance, largest, rounding=0.0))
        if part.products >= part.vectors.shape[1]
        else part.converged
        for part in parts
    ]
