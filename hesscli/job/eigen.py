"""`hesscli eigen`: the eigenvalues of a Hessian file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hesscli.errors import NumericalError, ResourceError
from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.files.resources import available_memory
from hesscli.job.json_form import Document
from hesscli.job.options import Which
from hesscli.job.results import writable, write_tensors
from hesscli.job.sizes import size
from hesscli.job.stored import chosen, opened_file
from hesscli.spectrum.eigen import top_eigenpairs
from hesscli.spectrum.tiles import tiles

SCHEMA = "hesscli.eigen/1"


@dataclass(frozen=True)
class EigenOptions:
    """What `eigen` was asked for, besides the Hessian or the problem."""

    top: int  # how many
    which: Which
    tolerance: float  # of a model
    max_products: int  # of a model
    per_block: bool  # of a model: the extremes of each parameter's own block
    block: str | None  # of a file: of this block alone
    output: Path | None  # where `eigenvalues` [k] and `eigenvectors` [k, n] go, if anywhere
    force: bool  # replace a file there that hesscli did not write


def eigen(source: str, options: EigenOptions) -> Document:
    """The first eigenvalues of a Hessian file, as a JSON document; "-" is standard input."""
    which, block, output = options.which, options.block, options.output
    if output is not None:
        inputs = () if source == "-" else (Path(source),)
        output = writable(output, options.force, inputs, name="eigen")
    with opened_file(source, "eigen") as file:
        document = file.document
        blocks = chosen(document, block, source)
        order = sum(facts["size"] for facts in blocks)
        pairs = top_eigenpairs(_blocks(file, blocks), order, options.top, which)
    result = {
        "schema": SCHEMA,
        "hessian": source,
        "structure": document["structure"],
        "curvature": document["curvature"],
        "which": which,
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "blocks": pairs.blocks,
        "converged": True,
        "block": block,
        "size": order,
    }
    if output is not None:
        kept = {key: result[key] for key in result if key != "hessian"}
        tensors = {"eigenvalues": pairs.values, "eigenvectors": pairs.vectors}
        write_tensors(output, tensors, "float64", kept)
    return result


def file_spectrum(source: str) -> tuple[Document, np.ndarray]:
    """All eigenvalues of a Hessian file, and what is to say of it; ResourceError: a block too large for LAPACK."""
    values: list[np.ndarray] = []
    with opened_file(source, "density") as file:
        document = file.document
        for name, _, array in _blocks(file, document["blocks"]):
            if array.ndim == 1:
                values.append(array.astype(np.float64))
                continue
            if 16 * array.size > available_memory():
                raise ResourceError(
                    f"{name}: all eigenvalues of {len(array)} x {len(array)} take "
                    f"{size(16 * array.size)} of memory",
                    "hesscli density MODEL DATA",
                )
            values.append(np.linalg.eigvalsh(array.astype(np.float64)))
    facts = {
        "hessian": source,
        "structure": document["structure"],
        "curvature": document["curvature"],
        "size": sum(map(len, values)),
    }
    return facts, np.concatenate(values) if values else np.zeros(0)


def _blocks(file: HessianFile, blocks: list[Document]) -> Iterator[tuple[str, int, np.ndarray]]:
    offset = 0
    for facts in blocks:
        if not facts["size"]:
            continue
        array = file.values(facts["name"])
        if not all(np.isfinite(array[tile]).all() for tile in tiles(array)):
            raise NumericalError(f"{facts['name']}: holds values that are not finite")
        yield facts["name"], offset, array
        offset += facts["size"]
