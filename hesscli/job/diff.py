"""`hesscli diff`: two Hessian files, block by block. Importing this loads no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np

from hesscli.errors import UsageError
from hesscli.files.hessians.hessian_file import HessianFile, read_hessian
from hesscli.hessian.blocks import partition
from hesscli.job.json_form import Document
from hesscli.job.options import Progress
from hesscli.spectrum.difference import difference

SCHEMA = "hesscli.diff/1"
_FROM_FINEST = ("elements", "block_diagonal", "module", "full")

Shapes = Mapping[str, list[int]]


def diff(a: Path, b: Path, rtol: float, atol: float, force: bool, progress: Progress) -> Document:
    """Compares B with A; with `force` what both have, whatever they are Hessians of.

    A block is equal if ||B - A|| <= rtol ||A|| in the Frobenius norm, or no entry differs by more than atol. Of two
    structures the coarser one is compared in the blocks of the finer.

    Raises:
        UsageError: the files hold different structures, or the Hessians of different losses or parameters.
    """
    ours, theirs = read_hessian(a), read_hessian(b)
    unlike = _unlike(ours, theirs)
    if unlike and not force:
        raise UsageError(
            f"{b}: {', '.join(unlike)} than in {a}",
            shlex.join(["hesscli", "diff", str(a), str(b), "--force"]),
        )
    # Each block of a structure lies in one of every coarser.
    structure = min((file.document["structure"] for file in (ours, theirs)), key=_FROM_FINEST.index)
    one, other = Finer(ours, structure), Finer(theirs, structure)
    shared = [name for name in one.blocks if name in other.blocks]
    common = [name for name in shared if one.blocks[name]["size"] == other.blocks[name]["size"]]
    total, done = sum(one.blocks[name]["size"] for name in common), 0
    rows = []
    for name in common:
        rows.append(_compared(one, other, name, rtol, atol))
        done += one.blocks[name]["size"]
        progress(done, total, name)
    only_a = [name for name in one.blocks if name not in other.blocks]
    only_b = [name for name in other.blocks if name not in one.blocks]
    other_size = [name for name in shared if name not in common]
    return {
        "schema": SCHEMA,
        "a": _side(a, ours.document),
        "b": _side(b, theirs.document),
        "unlike": unlike,
        "structure": structure,
        "rtol": rtol,
        "atol": atol,
        "blocks": rows,
        "only_a": only_a,
        "only_b": only_b,
        "other_size": other_size,
        "equal": all(row["equal"] for row in rows) and not (only_a or only_b or other_size),
    }


def _side(path: Path, document: Document) -> Document:
    kept = ("structure", "dtype", "loss", "gradient_norm")
    return {"path": str(path)} | {key: document[key] for key in kept}


def _unlike(a: HessianFile, b: HessianFile) -> list[str]:
    """What makes a comparison meaningless."""
    ours, theirs = _kind(a.document), _kind(b.document)
    found = [
        f"another {what} ({theirs[what]}, not {mine})"
        for what, mine in ours.items()
        if theirs[what] != mine
    ]
    full = ours["structure"] == theirs["structure"] == "full"
    return found + _unlike_parameters(a.shapes, b.shapes, full)


def _kind(document: Document) -> Document:
    loss = document["loss"]
    return {
        **{key: document[key] for key in ("structure", "curvature")},
        "loss": loss["name"],
        **{f"loss {key}": loss[key] for key in ("arguments", "reduction")},
    }


def _unlike_parameters(ours: Shapes, theirs: Shapes, full: bool) -> list[str]:
    """What gives rows of the same number another meaning; rows that are too many are seen without."""
    if full and list(ours) != list(theirs):
        same = ours.keys() == theirs.keys()
        what = "the same parameters in another order" if same else "other parameters"
        pair = next((t, o) for t, o in zip_longest(theirs, ours) if t != o)
        return [f"{what} ({pair[0] or 'none'}, not {pair[1] or 'none'})"]
    return [
        f"another shape of {name} ({theirs[name]}, not {shape})"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape and math.prod(theirs[name]) == math.prod(shape)
    ]


def _compared(one: Finer, other: Finer, name: str, rtol: float, atol: float) -> Document:
    a, b = one.blocks[name], other.blocks[name]
    found = difference(one.values(name), other.values(name))
    return {
        "name": name,
        "shape": a["shape"],
        "size": a["size"],
        "rel_diff": found.relative,
        "max_diff": found.largest,
        "d_trace": found.b_trace - found.a_trace,
        "d_eig_max": _change(a.get("eig_max"), b.get("eig_max")),
        "d_eig_min": _change(a.get("eig_min"), b.get("eig_min")),
        "equal": found.relative <= rtol or found.largest <= atol,
    }


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


class Finer:
    """The blocks that a file has of a structure: its own, or a finer one, of which shape and size alone are known."""

    def __init__(self, file: HessianFile, structure: str) -> None:
        self.file, self.structure = file, structure
        document = file.document
        self.blocks: dict[str, Document] = {facts["name"]: facts for facts in document["blocks"]}
        self._within: dict[str, tuple[str, list[int]]] = {}
        if structure != document["structure"]:
            self._take_apart()

    def _take_apart(self) -> None:
        """Finds each block's rows in the block that it lies in."""
        shapes = self.file.shapes
        places = {
            name: (block.name, rows)
            for block in partition(shapes, self.file.document["structure"])
            for name, rows in block.rows.items()
        }
        self.blocks = {}
        for block in partition(shapes, self.structure):
            shape = shapes.get(block.name, [block.size])
            self.blocks[block.name] = {"shape": shape, "size": block.size}
            rows = [row for name in block.parameters for row in places[name][1]]
            self._within[block.name] = (places[block.parameters[0]][0], rows)

    def values(self, name: str) -> np.ndarray:
        """A block's values, compared with their checksum: [n, n], or [n] for a diagonal one."""
        if name not in self._within:
            return self.file.values(name)
        whole, rows = self._within[name]
        values = self.file.values(whole)
        if self.structure == "elements":
            return values.diagonal()[rows]
        if rows and rows[-1] - rows[0] + 1 == len(rows):  # read as it is used
            piece = slice(rows[0], rows[-1] + 1)
            return values[piece, piece]
        return values[np.ix_(rows, rows)]
