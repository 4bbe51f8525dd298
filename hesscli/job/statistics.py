"""The statistics of blocks as they stand in a document. Importing this loads no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np

from hesscli.job.json_form import Document
from hesscli.spectrum.statistics import Statistics, of_diagonal, of_matrix


def of_block(array: np.ndarray, diagonal: bool, level: str) -> Document:
    """The table's columns for one block; None for what the level leaves out."""
    if level == "none":
        return dict.fromkeys(field.name for field in fields(Statistics))
    return asdict(of_diagonal(array) if diagonal else of_matrix(array, level))


def total(blocks: Sequence[Document]) -> Document:
    """Sums, and bounds: the extremes of diagonal blocks only bound those of the whole matrix, as do those of some."""

    def known(key: str) -> list[float]:
        values = [facts[key] for facts in blocks]
        return [] if None in values else values

    norms = known("fro_norm")
    return {
        "size": sum(facts["size"] for facts in blocks),
        "trace": sum(known("trace")) if known("trace") else None,
        "eig_max": max((b["eig_max"] for b in blocks if b["eig_max"] is not None), default=None),
        "eig_min": min((b["eig_min"] for b in blocks if b["eig_min"] is not None), default=None),
        "fro_norm": math.hypot(*norms) if norms else None,
        "bytes": sum(facts["bytes"] for facts in blocks),
    }


def symmetry_error(blocks: Sequence[Document]) -> float | None:
    """||H - H^T||_F / ||H||_F of all blocks together, before they were made symmetric; None if none was computed.

    A block that is zero but for rounding thus counts as little as it is. `norm` is the Frobenius norm of each, which
    `fro_norm` may leave out.
    """
    found = [(b["symmetry_error"], b["norm"]) for b in blocks if b["symmetry_error"] is not None]
    if not found:
        return None
    norm = math.hypot(*(norm for _, norm in found))
    return math.hypot(*map(math.prod, found)) / norm if norm else 0.0
