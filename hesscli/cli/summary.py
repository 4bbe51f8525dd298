"""How a Hessian, or the plan of one, is shown: facts, then one row per block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hesscli.cli.numbers import error, number, seconds
from hesscli.cli.output import Output
from hesscli.job.json_form import Document
from hesscli.job.sizes import counted, size

COLUMNS = ("trace", "eig_max", "eig_min", "fro_norm")
WIDE = (*COLUMNS, "mean_eig", "negative", "condition", "symmetry_error")


def print_hessian(out: Output, document: Document, columns: Sequence[str] = COLUMNS) -> None:
    """The summary of a Hessian, with these statistics."""
    *blocks, total = with_total(document)
    rows = [_row(facts, columns) for facts in blocks]
    if len(rows) > 1:
        rows.append(_row(total, columns, {"eig_max": ">=", "eig_min": "<="}))
    out.facts(_headline(document))
    out.table(["block", "shape", "size", *columns, "bytes"], rows)


def print_block(out: Output, document: Document) -> None:
    """All that is known of one block."""
    (facts,) = document["blocks"]
    shape = shape_text(facts["shape"])
    out.facts(_headline(document))
    out.facts(
        {
            "block": facts["name"],
            "shape": f"{shape or 'one number'}, {facts['size']} rows, {facts['bytes']} bytes",
            "method": facts["method"],
            **{key: statistic(facts, key) for key in (*WIDE, "check_error")},
        },
        gap=False,
    )


def print_plan(out: Output, document: Document) -> None:
    """What a command would take."""
    total = document["total"]
    rows = [
        [*first_cells(facts), str(facts["bytes"]), facts.get("plan", "")]
        for facts in with_total(document)
    ]
    out.facts(_headline(document))
    out.table(["block", "shape", "size", "bytes", "method"], rows, words=(0, 1, 4))
    out.line(
        f"\nwould take about {seconds(total['estimated_seconds'])}, "
        f"{size(total['memory'])} of memory, {size(total['bytes'])} of disk; "
        "nothing was computed"
    )


def _headline(document: Document) -> dict[str, str]:
    """What stands above the table of a Hessian, or of a plan, which knows less."""
    loss, data = document["loss"], document["data"]
    terms = [f"{name}={value}" for name, value in loss["arguments"].items()]
    terms += [loss["reduction"], f"N = {data['samples']}"]
    value = f"{loss['name']} ({', '.join(terms)}) = {number(loss['value'])}"
    matrix = f"{document['structure']}, {document['dtype']} on {document['device']}"
    model = {"model": f"{_named(document['model'])} x {_named(data)}"}
    if "gradient_norm" not in document:
        return model | {"loss": value} | _matrix(document, matrix)
    value += f", gradient norm {number(document['gradient_norm'])}"
    matrix += f", {document['method']}"
    return model | {"loss": value} | _matrix(document, matrix) | {"check": _check(document)}


def _matrix(document: Document, text: str) -> dict[str, str]:
    """The line that says which matrix it is, and the text of it."""
    curvature = document["curvature"]
    if curvature == "hessian":
        return {"hessian": text}
    return {"matrix": f"{curvature.replace('_', ' ')}, {text}"}


def _check(document: Document) -> str:
    """What the check found, and what all of it took."""
    check, symmetry = document["check"], document["symmetry_error"]
    found = [f"error {error(check['relative_error'])}" if check else "not done"]
    if document.get("products"):
        found.append(counted(document["products"], "product"))
    if symmetry is not None:
        found.append(f"symmetry error {error(symmetry)}")
    if "seconds" in document:
        found.append(seconds(document["seconds"]))
    return ", ".join(found)


def products_headline(document: Document) -> dict[str, str]:
    """What stands above the results of products, which no matrix was formed for."""
    size = document["size"]
    return _headline({**document, "structure": f"{size} x {size}", "symmetry_error": None})


def spectrum_headline(document: Document) -> dict[str, str]:
    """What stands above the eigenvalues, or the density, of a Hessian file or of a model."""
    if "model" in document:
        return products_headline(document)
    source = "standard input" if document["hessian"] == "-" else document["hessian"]
    part = f"block {document['block']}" if document.get("block") else document["structure"]
    return _matrix(document, f"{source} ({part}, {document['size']} x {document['size']})")


def _named(file: Document) -> str:
    """A file's path; the beginning of its hash where the path is not known, as in a Hessian file."""
    return file.get("path") or f"sha256:{file['sha256'][:12]}"


def _row(
    facts: Document, columns: Sequence[str], bounds: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A row of the table; a statistic that only bounds the matrix's own has its sign in `bounds`."""
    cells = {key: statistic(facts, key) for key in columns}
    return [
        *first_cells(facts),
        *(cell if cell == "-" else bounds.get(key, "") + cell for key, cell in cells.items()),
        str(facts["bytes"]),
    ]


def with_total(document: Document) -> list[Document]:
    """What is said of each block, and of all."""
    return [*document["blocks"], {"name": "total", "shape": [], **document["total"]}]


def first_cells(facts: Document) -> list[str]:
    """Name, shape and size of a block, with which every row begins."""
    return [facts["name"], shape_text(facts["shape"]), str(facts["size"])]


def statistic(facts: Document, key: str) -> str:
    """A statistic of a block as text; `-` for what was not computed."""
    value = facts.get(key)
    if key == "negative":
        return "-" if value is None else str(value)
    if key in ("symmetry_error", "check_error"):
        return error(value)
    return "inf" if value == math.inf else number(value)


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
