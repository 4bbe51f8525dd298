"""`hesscli hvp`: products of a model's curvature with vectors, and the term of Per-FedAvg."""

from __future__ import annotations

import glob
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hesscli.errors import MismatchError, NumericalError, UsageError
from hesscli.files.arrays import load_arrays
from hesscli.files.roles import is_other_file
from hesscli.files.sniff import kind_of
from hesscli.hessian.objective.problem import Problem
from hesscli.job.json_form import Document, timeless
from hesscli.job.operator import Operator, open_operator
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.results import demand_names, writable, write_tensors
from hesscli.job.setup.processes import Processes
from hesscli.texts import dtype_name, listed
from hesscli.widest import wide

SCHEMA = "hesscli.hvp/1"


@dataclass(frozen=True)
class HvpOptions:
    """What `hvp` was asked for, besides the problem: of `vector` and `per_fedavg` there is one."""

    vector: str | None  # what is multiplied: a file, "gradient" or "random"
    per_fedavg: float | None  # alpha, to write (I - alpha H) g' instead
    query: Path | None  # the data of g', if it is other data
    gradient: bool  # also write the gradient
    output: Path  # where all of it goes
    force: bool  # replace a file there that hesscli did not write

    @property
    def file(self) -> Path | None:
        """The file that holds the vector."""
        return None if self.vector in (None, "gradient", "random") else Path(str(self.vector))


def hvp(
    problem: ProblemOptions,
    options: HvpOptions,
    listener: Listener,
    processes: Processes,
) -> Document:
    """Writes H v, or (I - alpha H(theta)) g', keyed and shaped as the parameters.

    g' is the gradient at theta - alpha * gradient(theta) on the query data: the term of Per-FedAvg and MAML.
    """
    started = time.perf_counter()
    _demand_sense(problem, options)
    read = [*problem.files, *(path for path in (options.query, options.file) if path is not None)]
    for path in read:
        kind_of(path)  # before the work
    output = writable(options.output, options.force, read, name="hvp")
    operator = open_operator(problem, listener, processes)
    demand_names(operator.products.names, operator.products.names, options.gradient)
    vectors, result, facts = _product(operator, options)
    if not bool(torch.isfinite(result).all()):
        raise operator.not_finite("the product")
    document = operator.document(SCHEMA) | facts | _norms(operator, vectors, result)
    _write(output, operator, options, result, document)
    return document | {
        "seconds": time.perf_counter() - started,
        "output": str(options.output),
    }


def _demand_sense(problem: ProblemOptions, options: HvpOptions) -> None:
    """Raises UsageError where options do not go together."""
    if options.query is not None and options.per_fedavg is None:
        raise UsageError(
            "--query goes with --per-fedavg", "--per-fedavg 0.01", instead_of=("--vector",)
        )
    if (options.vector is None) == (options.per_fedavg is None):
        raise UsageError(
            "expected one of --vector and --per-fedavg",
            f"--vector {shlex.quote(options.vector or 'gradient')}",
            instead_of=("--per-fedavg", "--query"),
        )
    beside = [name for name in problem.arrays if is_other_file(name)]
    if options.query is not None and beside:
        raise UsageError(
            f"{beside[0]}: a file beside DATA, whose samples are not those of --query {options.query}; "
            "expected inputs and targets of each in one file",
            f"np.savez({str(options.query.with_suffix('.npz'))!r}, x=x, y=y)",
        )
    if options.per_fedavg is not None and problem.curvature != "hessian":
        raise UsageError("Per-FedAvg is defined with the Hessian", "--curvature hessian")


def _product(operator: Operator, options: HvpOptions) -> tuple[Tensor, Tensor, Document]:
    """What was multiplied, [P] or [k, P], what came of it, and what there is to say of the two."""
    facts: Document = {"vector": options.vector, "per_fedavg": options.per_fedavg}
    if options.per_fedavg is None:
        vectors = _vectors(operator, str(options.vector))
        return vectors, operator.products(vectors), facts
    vector, query = _adapted_gradient(operator, options)
    result = vector - options.per_fedavg * operator.products(vector)
    return vector, result, facts | {"query": query}


def _write(
    output: Path, operator: Operator, options: HvpOptions, result: Tensor, document: Document
) -> None:
    tensors = operator.products.by_parameter(result)
    if options.gradient:
        parts = operator.products.by_parameter(operator.gradient)
        tensors |= {f"gradient.{name}": part for name, part in parts.items()}
    dtype = dtype_name(operator.problem.dtype)
    kept = timeless(document)
    if options.file is not None:
        kept["vector"] = "file"
    write_tensors(output, {n: part.cpu().numpy() for n, part in tensors.items()}, dtype, kept)


def _norms(operator: Operator, vectors: Tensor, result: Tensor) -> Document:
    """Norms by parameter and of all, over all vectors where there are several."""

    def norm(tensor: Tensor) -> float:
        return float(torch.linalg.norm(wide(tensor)))

    v, r = operator.products.by_parameter(vectors), operator.products.by_parameter(result)
    blocks = [
        facts | {"vector_norm": norm(v[facts["name"]]), "product_norm": norm(r[facts["name"]])}
        for facts in operator.parameter_facts()
    ]
    rows, products = vectors.reshape(-1, operator.size), result.reshape(-1, operator.size)
    along = (wide(rows) * wide(products)).sum(1).tolist()
    squares = wide(rows).square().sum(1).tolist()
    rayleigh = [a / b if b else None for a, b in zip(along, squares, strict=True)]
    total = {
        "size": operator.size,
        "vector_norm": norm(vectors),
        "product_norm": norm(result),
    }
    return {"vectors": len(rows), "blocks": blocks, "total": total, "rayleigh": rayleigh}


def _vectors(operator: Operator, source: str) -> Tensor:
    """[P], or [k, P] of a file."""
    if source == "gradient":
        return operator.gradient
    problem = operator.problem
    if source == "random":
        v = torch.randn(operator.size, generator=operator.generator(), dtype=torch.float64)
        return v.to(problem.device, problem.dtype)
    return _of_file(source, problem)


def _of_file(source: str, problem: Problem) -> Tensor:
    """[P], or [k, P] where each of its tensors stacks k."""
    tensors = load_arrays(source, swapped="--vector gradient").numbers
    parts: list[Tensor] = []
    counts: dict[int | None, str] = {}  # and the first tensor that stacks so many
    for name, parameter in problem.parameters.items():
        if name not in tensors:
            held = [glob.escape(n) for n in problem.parameters if n in tensors]
            raise MismatchError(
                f"{source}: holds no tensor {name!r}; it holds: {listed(tensors)}",
                f"--params {shlex.quote(held[0])}" if held else "--vector gradient",
            )
        part, shape = tensors[name], parameter.shape
        if part.is_complex():
            raise MismatchError(
                f"{source}: {name} is complex; the curvature multiplies real vectors"
            )
        part = part.to(problem.device, problem.dtype)
        if part.shape != shape and part.shape[1:] != shape:
            raise MismatchError(
                f"{source}: {name} has shape {list(part.shape)}; expected {list(shape)}, or "
                f"{['k', *shape]} for k vectors".replace("'", "")
            )
        stacked = part.shape != shape
        counts.setdefault(len(part) if stacked else None, f"{name} has shape {list(part.shape)}")
        parts.append(part.reshape(len(part), parameter.numel()) if stacked else part.reshape(-1))
    if 0 in counts or len(counts) > 1:
        raise MismatchError(
            f"{source}: {', '.join([*counts.values()][:2])}; expected as many vectors in each, one or more"
        )
    vectors = torch.cat(parts, -1)
    if not bool(torch.isfinite(vectors).all()):
        raise NumericalError(f"{source}: holds NaN or infinity")
    return vectors


def _adapted_gradient(operator: Operator, options: HvpOptions) -> tuple[Tensor, Document | None]:
    """The gradient at theta - alpha gradient(theta), on the query data; and what there is to say of that."""
    assert options.per_fedavg is not None
    problem, facts = operator.problem, None
    if options.query is not None:
        other = replace(operator.opened.options, data=options.query)
        if other.loss == "auto":  # that of the data, whatever the query's targets look like
            other = replace(other, loss=problem.loss.name)
        opened = operator.processes.open(other, operator.opened.listener)
        problem, facts = operator.processes.problem(opened, 1), opened.facts["data"]
    if abs(options.per_fedavg) > torch.finfo(problem.dtype).max:
        raise NumericalError(
            f"a step of {options.per_fedavg:g} is more than float32 holds", "--dtype float64"
        )
    names = list(problem.parameters)
    return problem.moved_gradient(names, operator.gradient, -options.per_fedavg), facts
