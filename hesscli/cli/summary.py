"""How a Hessian, or the plan of one, is shown: facts, then one row per block."""

from __future__ import annotations

from collections.abc import Sequence

from hesscli.cli.output import Document, Output, error, number, seconds
from hesscli.job.sizes import size


def print_hessian(out: Output, document: Document) -> None:
    """The summary of a Hessian."""
    if not out.wants_text(document):
        return
    rows = [_row(facts) for facts in document["blocks"]]
    if len(rows) > 1:
        total = _row({"name": "total", "shape": [], **document["total"]})
        total[4] = _bound(">=", total[4])
        total[5] = _bound("<=", total[5])
        rows.append(total)
    out.facts(headline(document))
    out.table(["block", "shape", "size", "trace", "eig_max", "eig_min", "fro_norm", "bytes"], rows)


def print_plan(out: Output, document: Document) -> None:
    """What a command would take."""
    if not out.wants_text(document):
        return
    total = document["total"]
    rows = [
        [
            facts["name"],
            shape_text(facts["shape"]),
            str(facts["size"]),
            str(facts["bytes"]),
            facts["plan"],
        ]
        for facts in document["blocks"]
    ]
    rows.append(["total", "", str(total["size"]), str(total["bytes"]), ""])
    out.facts(headline(document))
    out.table(["block", "shape", "size", "bytes", "method"], rows, words=(0, 1, 4))
    out.line(
        f"\nwould take about {seconds(total['estimated_seconds'])}, "
        f"{size(total['memory'])} of memory, {size(total['bytes'])} of disk; "
        "nothing was computed"
    )


def headline(document: Document) -> dict[str, str]:
    """What stands above the table of a Hessian, or of a plan, which knows less."""
    loss, data = document["loss"], document["data"]
    terms = [f"{name}={value}" for name, value in loss["arguments"].items()]
    terms += [loss["reduction"], f"N = {data['samples']}"]
    facts = {
        "model": f"{document['model']['path']} x {data['path']}",
        "loss": f"{loss['name']} ({', '.join(terms)}) = {number(loss['value'])}",
    }
    curvature = document.get("curvature", "hessian")
    label = "hessian" if curvature == "hessian" else "matrix"
    facts[label] = f"{document['structure']}, {document['dtype']} on {document['device']}"
    if label == "matrix":
        facts[label] = f"{curvature.replace('_', ' ')}, {facts[label]}"
    if "gradient_norm" not in document:
        return facts
    facts["loss"] += f", gradient norm {number(document['gradient_norm'])}"
    facts[label] += f", {document['method']}"
    check, symmetry = document["check"], document["symmetry_error"]
    facts["check"] = f"error {error(check['relative_error'])}" if check else "not done"
    if symmetry is not None:
        facts["check"] += f", symmetry error {error(symmetry)}"
    if "seconds" in document:
        facts["check"] += f", {seconds(document['seconds'])}"
    return facts


def products_headline(document: Document) -> dict[str, str]:
    """What stands above the results of products, which no matrix was formed for."""
    size = document["size"]
    facts = headline({**document, "structure": f"{size} x {size}", "symmetry_error": None})
    if document.get("products"):
        check, *rest = facts["check"].split(", ")
        facts["check"] = ", ".join([check, f"{document['products']} products", *rest])
    return facts


def _row(facts: Document) -> list[str]:
    return [
        facts["name"],
        shape_text(facts["shape"]),
        str(facts["size"]),
        *(number(facts[key]) for key in ("trace", "eig_max", "eig_min", "fro_norm")),
        str(facts["bytes"]),
    ]


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _bound(sign: str, text: str) -> str:
    return text if text == "-" else f"{sign}{text}"
