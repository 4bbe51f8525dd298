"""The JSON document of a Hessian: what `--json` prints, and, less times and paths, what the file holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import hesscli
from hesscli.files.hessians.hessian_file import SCHEMA
from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.check import Certificate
from hesscli.job.json_form import Document
from hesscli.job.setup.opening import Opened
from hesscli.texts import dtype_name


def skeleton(opened: Opened, structure: str) -> Document:
    """The document as far as it is known before anything is computed."""
    offset, parameters = 0, []
    for name, p in opened.problem.parameters.items():
        parameters.append({"name": name, "shape": list(p.shape), "offset": offset})
        if name in opened.tied:
            parameters[-1]["tied"] = opened.tied[name]
        offset += p.numel()
    return {
        "schema": SCHEMA,
        "versions": {
            "hesscli": hesscli.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        **opened.facts,
        "structure": structure,
        "dtype": dtype_name(opened.problem.dtype),
        "device": opened.problem.device.type,
        "parameters": parameters,
        "frozen": opened.frozen,
        "notes": list(opened.listener.notes),
    }


def block_facts(opened: Opened, block: Block) -> Document:
    """Name, shape and size of a block; a parameter's own shape where it is one parameter's."""
    p = opened.problem.parameters.get(block.name)
    return {
        "name": block.name,
        "shape": [block.size] if p is None else list(p.shape),
        "size": block.size,
    }


def methods(blocks: Sequence[Document]) -> str:
    """All those by which blocks were computed."""
    return " + ".join(sorted({facts["method"] for facts in blocks}))


def block_check_facts(
    certificate: Certificate | None, blocks: Sequence[Document]
) -> Document | None:
    """The check of blocks, or of their diagonals."""
    if certificate is None:
        return None
    errors = [facts["check_error"] for facts in blocks if facts["check_error"] is not None]
    return check_facts(certificate, len(errors), max(errors, default=0.0))


def check_facts(certificate: Certificate, directions: int, error: float) -> Document:
    """A check that found this error at most, along so many directions."""
    return {
        "kind": certificate.kind,
        "dtype": dtype_name(certificate.digits),
        "directions": directions,
        "relative_error": error,
        "tolerance": certificate.tolerance,
    }
