"""`hesscli density`: the spectral density of a Hessian file or of a model's curvature."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from hesscli.errors import UsageError
from hesscli.job.eigen import file_spectrum
from hesscli.job.figures import drawable, plot_density
from hesscli.job.json_form import Document, timeless
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.results import replacing, writable, write_tensors
from hesscli.job.setup.processes import Processes
from hesscli.spectrum.density import Density, exact

SCHEMA = "hesscli.density/1"
_BINS = 24
_LARGEST = 4096  # parameters of a model whose matrix is formed, if that takes no more products


def density(
    hessian: str | ProblemOptions,
    probes: int,
    steps: int,
    output: Path | None,
    plot: Path | None,
    force: bool,
    listener: Listener,
    processes: Processes,
) -> Document:
    """The density of a Hessian file, by its path, or of a model's curvature, as a JSON document.

    Args:
        probes: of a model: random vectors to average over, with so many `steps`, products, for each.
        output: where `nodes` [k] and `weights` [k] go, and `plot` a figure, if anywhere.
        force: replace files there that hesscli did not write.
    """
    started = time.perf_counter()
    inputs = (Path(hessian),) if isinstance(hessian, str) else hessian.files
    if output is not None:
        if output.suffix.lower() not in (".safetensors", ".json") and output != Path("-"):
            raise UsageError(f"{output}: neither .safetensors nor .json", "-o density.safetensors")
        output = writable(output, force, inputs, name="density")
    if plot is not None:
        plot = drawable(plot, force, inputs)
    if isinstance(hessian, str):
        document, values = file_spectrum(hessian)
        found, products = exact(values), 0
    else:
        document, found, products = _of_model(hessian, probes, steps, listener, processes)
    edges, mass = found.histogram(_BINS)
    document |= {
        "schema": SCHEMA,
        "exact": found.exact,
        "probes": found.probes,
        "steps": None if found.exact else min(steps, document["size"]),
        "products": products,
        "interrupted": found.interrupted,
        "nodes": found.nodes.tolist(),
        "weights": found.weights.tolist(),
        "histogram": {"edges": edges.tolist(), "mass": mass.tolist()},
    }
    if output is not None and not found.interrupted:
        _write(output, document, found)
    if plot is not None and not found.interrupted:
        plot_density(plot, document, found)
    return document | {"seconds": time.perf_counter() - started}


def _of_model(
    problem: ProblemOptions, probes: int, steps: int, listener: Listener, processes: Processes
) -> tuple[Document, Density, int]:
    import torch

    from hesscli.job.operator import open_operator
    from hesscli.spectrum.dense import DENSE, HELD, dense
    from hesscli.spectrum.quadrature import lanczos_quadrature

    operator = open_operator(problem, listener, processes)
    if operator.size <= max(DENSE, min(probes * steps, _LARGEST)):
        few = (operator.size - 1) // steps if operator.size > DENSE else 0
        fewer = f"--probes {few}" if few else None
        operator.needs(HELD * operator.size, "the whole matrix", lambda _: fewer, torch.float64)
        with operator.finite():
            found = exact(dense(operator.products.matrix_rows, operator.size, listener.progress)[0])
    else:
        steps = min(steps, operator.size)
        operator.needs(
            steps + 4, f"--steps {steps}", lambda room: f"--steps {room - 4}" if room > 4 else None
        )
        with operator.finite():
            found = lanczos_quadrature(
                operator.products,
                operator.size,
                probes,
                steps,
                operator.generator(),
                operator.gradient,
                listener.progress,
            )
    return operator.document(SCHEMA), found, operator.products.count


def _write(path: Path, document: Document, found: Density) -> None:
    """The numbers: as JSON where the name says so, else as safetensors."""
    left = ("schema", "hessian", "nodes", "weights")
    facts = {key: document[key] for key in document if key not in left}
    kept = {"schema": SCHEMA, **timeless(facts)}
    if path.suffix.lower() == ".json":
        text = json.dumps(
            kept | {"nodes": document["nodes"], "weights": document["weights"]}, indent=2
        )
        with replacing(path) as temporary:
            temporary.write_text(text + "\n")
        return
    tensors = {
        "nodes": found.nodes,
        "weights": found.weights,
        "histogram.edges": np.array(document["histogram"]["edges"]),
        "histogram.mass": np.array(document["histogram"]["mass"]),
    }
    write_tensors(path, tensors, "float64", kept)
