"""Hessian files made of given matrices, by safetensors alone."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def symmetric(n: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    """A random symmetric matrix [n, n]."""
    a = np.random.default_rng(seed).standard_normal((n, n))
    return ((a + a.T) / 2).astype(dtype)


def document(
    blocks: Mapping[str, np.ndarray],
    /,
    structure: str = "block_diagonal",
    parameters: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The document of a file that holds these blocks, with statistics from `numpy.linalg`."""
    shapes = parameters or {
        name: a.shape if structure == "elements" else (len(a),) for name, a in blocks.items()
    }
    offset, listed = 0, []
    for name, shape in shapes.items():
        listed.append({"name": name, "shape": list(shape), "offset": offset})
        offset += math.prod(shape)
    facts = [_facts(name, a, structure) for name, a in blocks.items()]
    return {
        "schema": "hesscli.hessian/1",
        "versions": {"hesscli": "0", "torch": "0", "numpy": "0"},
        "model": {"kind": "torchscript", "sha256": "ab" * 32},
        "data": {"sha256": "cd" * 32, "samples": 6, "inputs": ["x"], "targets": "y"},
        "loss": {
            "name": "mse",
            "arguments": {},
            "reduction": "mean",
            "denominator": 6.0,
            "value": 0.5,
            "inferred": True,
        },
        "structure": structure,
        "curvature": "hessian",
        "dtype": str(next(iter(blocks.values())).dtype),
        "device": "cpu",
        "parameters": listed,
        "frozen": [],
        "notes": [],
        "gradient_norm": 0.25,
        "blocks": facts,
        "total": {
            "size": sum(f["size"] for f in facts),
            "trace": sum(f["trace"] for f in facts),
            "eig_max": max(f["eig_max"] for f in facts),
            "eig_min": min(f["eig_min"] for f in facts),
            "fro_norm": math.sqrt(sum(f["fro_norm"] ** 2 for f in facts)),
            "bytes": sum(f["bytes"] for f in facts),
        },
        "method": "hvp",
        "symmetry_error": 0.0,
        "check": None,
    } | changes


def _facts(name: str, a: np.ndarray, structure: str) -> dict[str, Any]:
    elements = structure == "elements"
    values = np.sort(a.ravel()) if elements else np.linalg.eigvalsh(a.astype(np.float64))
    return {
        "name": name,
        "shape": list(a.shape) if elements else [len(a)],
        "size": len(values),
        "method": "hvp",
        "trace": float(a.sum() if elements else np.trace(a)),
        "eig_max": float(values[-1]),
        "eig_min": float(values[0]),
        "fro_norm": float(np.linalg.norm(a.ravel())),
        "bytes": a.nbytes,
        "symmetry_error": None,
        "check_error": None,
    }


def checksum(a: np.ndarray) -> str:
    """Of rows r, the sum of (2 r + 1) crc32(r), modulo 2^64."""
    rows = a if a.ndim > 1 else [a]
    total = sum((2 * r + 1) * zlib.crc32(row.tobytes()) for r, row in enumerate(rows))
    return f"{total % 2**64:016x}"


def write(
    path: Path,
    blocks: Mapping[str, np.ndarray],
    /,
    structure: str = "block_diagonal",
    parameters: Mapping[str, Sequence[int]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Writes the file; gives its document."""
    arrays = {name: np.ascontiguousarray(a) for name, a in blocks.items()}
    written = document(blocks, structure, parameters, **changes)
    written["checksums"] = {name: checksum(a) for name, a in arrays.items()}
    text = json.dumps(written, separators=(",", ":"))
    written["checksum"] = f"{zlib.crc32(text.encode()):08x}"
    save_file(arrays, path, {"format": "pt", "hesscli": json.dumps(written)})
    return written
