"""Matrix-free work: the competitors, one small function each, and the jobs that run them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from tests.benchmarks import models
from tests.benchmarks.models import Problem
from tests.benchmarks.peers import flat, split
from tests.benchmarks.tasks import PACKAGES, PAIRS, PAIRS_TOLERANCE, PRODUCTS

STEPS = 80  # of hessian-eigenthings, which does not restart

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Files:
    """The saved problem, and what most peers need: an `nn.Module`."""

    problem: Problem
    model: str
    data: str


@dataclass(frozen=True)
class Pairs:
    """Eigenvalues [k], largest first, and eigenvectors [k, P]; products spent."""

    values: Tensor
    vectors: Tensor
    products: int


def _scipy(
    multiply: Multiply, size: int, dtype: torch.dtype, tolerance: float, basis: int | None = None
) -> Pairs:
    """The largest by `eigsh`, with its own choice of the basis if none is given."""
    count = 0

    def counted(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return multiply(torch.from_numpy(x.reshape(-1))).numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype).numpy()
    operator = LinearOperator((size, size), matvec=counted, dtype=start.dtype)
    values, columns = eigsh(operator, k=PAIRS, which="LA", tol=tolerance, v0=start, ncv=basis)
    best = np.argsort(-values)
    return Pairs(
        torch.from_numpy(values[best].copy()), torch.from_numpy(columns[:, best].T.copy()), count
    )


def _count(problem: Problem) -> int:
    return sum(p.numel() for p in problem.module.parameters())


# One product, of a problem that is linearised where the peer does so


def hesscli_product(files: Files) -> Multiply:
    """Made and probed, but not checked in float64: that is paid once, however many products follow."""
    import hesscli

    operator = hesscli.operator(files.model, files.data, check=False)
    return lambda v: torch.from_numpy(operator.matvec(v.numpy()))


def curvlinops_product(files: Files) -> Multiply:
    from curvlinops import HessianLinearOperator

    problem = files.problem
    operator = HessianLinearOperator(
        problem.module,
        problem.loss,
        list(problem.module.parameters()),
        [(problem.inputs, problem.target)],
        check_deterministic=False,
    )
    return lambda v: operator @ v


def pyhessian_product(files: Files) -> Multiply:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    problem = files.problem
    data = (problem.inputs, problem.target)
    computer = hessian(problem.module, problem.loss, data=data, cuda=False)
    return lambda v: flat(
        hessian_vector_product(computer.gradsH, computer.params, split(v, computer.params))
    )


PRODUCT_PEERS: dict[str, Callable[[Files], Multiply]] = {
    "hesscli": hesscli_product,
    "curvlinops": curvlinops_product,
    "pyhessian": pyhessian_product,
}


# The largest eigenvalues


def eigsh_operator(files: Files) -> Pairs:
    """SciPy with the operator of hesscli's Python API."""
    import hesscli

    operator = hesscli.operator(files.model, files.data)
    return _scipy(
        lambda v: torch.from_numpy(operator.matvec(v.numpy())),
        operator.shape[0],
        torch.float32,
        PAIRS_TOLERANCE,
    )


def curvlinops_pairs(files: Files) -> Pairs:
    return _scipy(curvlinops_product(files), _count(files.problem), torch.float32, PAIRS_TOLERANCE)


def pyhessian_pairs(files: Files) -> Pairs:
    """Power iteration with deflation: the largest in magnitude, one after the other."""
    from pyhessian import hessian as module

    computed = import_module("pyhessian.hessian")
    product, count = computed.hessian_vector_product, 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return product(*arguments)

    computed.hessian_vector_product = counted
    problem = files.problem
    data = (problem.inputs, problem.target)
    computer = module(problem.module, problem.loss, data=data, cuda=False)
    values, vectors = computer.eigenvalues(top_n=PAIRS, tol=PAIRS_TOLERANCE)
    order = sorted(range(PAIRS), key=lambda i: -values[i])
    return Pairs(
        torch.tensor([values[i] for i in order]),
        torch.stack([flat(vectors[i]) for i in order]),
        count,
    )


def eigenthings_pairs(files: Files) -> Pairs:
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    problem = files.problem
    operator = HessianOperator(
        problem.module, [(problem.inputs, problem.target)], supervised_loss(problem.loss)
    )
    found = lanczos(
        operator,
        k=PAIRS,
        max_iter=min(STEPS, operator.size),
        tol=PAIRS_TOLERANCE,
        which="LA",
        seed=0,
    )
    return Pairs(found.eigenvalues, found.eigenvectors, found.iterations)


EIGEN_PEERS: dict[str, Callable[[Files], Pairs]] = {
    "curvlinops": curvlinops_pairs,
    "pyhessian": pyhessian_pairs,
    "hessian-eigenthings": eigenthings_pairs,
    "eigsh-operator": eigsh_operator,
}


# Jobs


def eigen(task: str, toy: bool, peer: str, model: str, data: str, output: str) -> dict[str, Any]:
    """Model file to eigenpairs, which are then written for the judge."""
    import_module(PACKAGES.get(peer, "torch"))
    started = time.perf_counter()
    pairs = EIGEN_PEERS[peer](Files(models.load(task, toy, Path(model), Path(data)), model, data))
    seconds = time.perf_counter() - started
    save_file(
        {
            "eigenvalues": pairs.values.detach().contiguous(),
            "eigenvectors": pairs.vectors.detach().contiguous(),
        },
        output,
    )
    return {"seconds": seconds, "products": pairs.products}


def judge(
    task: str, toy: bool, model: str, data: str, found: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Each tool's greatest relative error, and its greatest relative residual, both in float64.

    The reference is `eigsh` to 1e-10 on a float64 double backward that shares nothing with hesscli.
    """
    problem = models.load(task, toy, Path(model), Path(data))
    multiply = _double(problem)
    size = _count(problem)
    expected = _scipy(multiply, size, torch.float64, 1e-10, min(size, 8 * PAIRS)).values
    facts: dict[str, dict[str, float]] = {}
    for tool, file in found.items():
        pairs = load_file(file)
        values, vectors = pairs["eigenvalues"].double(), pairs["eigenvectors"].double()
        left = [
            (multiply(v) - value * v).norm() / (value.abs() * v.norm())
            for value, v in zip(values, vectors, strict=True)
        ]
        facts[tool] = {
            "error": float(((values - expected) / expected).abs().max()),
            "residual": float(torch.stack(left).max()),
        }
    return facts


def product(task: str, toy: bool, peer: str, model: str, data: str) -> dict[str, Any]:
    """What one of `PRODUCTS` products takes, linearisation included, in gradients taken in between.

    `error` is the relative distance of one product from a float64 one.
    """
    problem = models.load(task, toy, Path(model), Path(data))
    chosen = list(problem.module.parameters())
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(PRODUCTS, _count(problem), generator=generator)
    import_module(PACKAGES.get(peer, "hesscli.job.operator"))

    def gradient() -> None:
        torch.autograd.grad(problem.loss(problem.module(problem.inputs), problem.target), chosen)

    for _ in range(3):
        gradient()
    started = time.perf_counter()
    multiply = PRODUCT_PEERS[peer](Files(problem, model, data))
    making = time.perf_counter() - started
    products = gradients = 0.0
    for vector in vectors:
        started = time.perf_counter()
        last = multiply(vector)
        between = time.perf_counter()
        gradient()
        products += between - started
        gradients += time.perf_counter() - between
    expected = _double(models.load(task, toy, Path(model), Path(data)))(vectors[-1].double())
    error = torch.linalg.norm(last.detach().double() - expected) / torch.linalg.norm(expected)
    return {
        "seconds": (making + products) / PRODUCTS,
        "gradient": gradients / PRODUCTS,
        "gradients": (making + products) / gradients,
        "further": products / gradients,
        "error": float(error),
    }


def _double(problem: Problem) -> Multiply:
    """v -> H v in float64, by double backward of one graph."""
    module = problem.module.double()
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    chosen = list(module.parameters())
    loss = problem.loss(module(inputs), problem.target)
    slope = flat(torch.autograd.grad(loss, chosen, create_graph=True))
    return lambda v: flat(torch.autograd.grad(slope, chosen, v, retain_graph=True))
