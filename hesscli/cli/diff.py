"""`hesscli diff A B`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.commands import prints
from hesscli.cli.numbers import error, number
from hesscli.cli.options import Markdown
from hesscli.cli.output import Output
from hesscli.errors import CheckError
from hesscli.job.json_form import Document


@prints
def diff(
    out: Output,
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The Hessian file to compare with.", readable=False)
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="The Hessian file to compare.", readable=False)
    ],
    rtol: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="A block is equal if ||B - A|| <= X ||A||, ..."),
    ] = 1e-5,
    atol: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="... or if no entry differs by more than X."),
    ] = 1e-8,
    force: Annotated[
        bool,
        typer.Option(
            "--force", "-f", help="Compare what both have, also of another structure or loss."
        ),
    ] = False,
    markdown: Markdown = False,
) -> None:
    """Compare two Hessian files block by block; exit 1 when they differ. Loads no torch.

    \b
    Example:
      hesscli diff before.safetensors after.safetensors
      hesscli diff float32.safetensors float64.safetensors --rtol 1e-4
      hesscli diff before.safetensors after.safetensors --json | jq .equal

    Both files are read whole, in pieces, so they may be larger than the memory. The changes d_trace,
    d_eig_max and d_eig_min are B less A.
    """
    from hesscli.job.diff import diff as run

    out.use_markdown(markdown)
    document = run(a, b, rtol, atol, force, out.progress)
    out.result(document, print_difference)
    if not document["equal"]:
        raise CheckError(_verdict(document))


def print_difference(out: Output, document: Document) -> None:
    """What differs, block by block."""
    a, b = document["a"], document["b"]
    rows = [
        [
            facts["name"],
            str(facts["size"]),
            "inf" if facts["rel_diff"] == math.inf else error(facts["rel_diff"]),
            error(facts["max_diff"]),
            *(number(facts[key]) for key in ("d_trace", "d_eig_max", "d_eig_min")),
            "yes" if facts["equal"] else "no",
        ]
        for facts in document["blocks"]
    ]
    described = {"a": _described(a), "b": _described(b)}
    if a["structure"] != b["structure"]:
        described["compared"] = f"the blocks of {document['structure']}, which both have"
    out.facts(described | _apart(document))
    changes = ["rel_diff", "max_diff", "d_trace", "d_eig_max", "d_eig_min"]
    out.table(["block", "size", *changes, "equal"], rows, words=(0, 7))


def _described(side: Document) -> str:
    loss = side["loss"]
    of = f"{loss['name']} {number(loss['value'])}"
    return f"{side['path']} ({side['structure']}, {side['dtype']}), {of}"


def _apart(document: Document) -> dict[str, str]:
    """The blocks that could not be compared."""
    named = {"only in a": "only_a", "only in b": "only_b", "other size": "other_size"}
    return {label: ", ".join(document[key]) for label, key in named.items() if document[key]}


def _verdict(document: Document) -> str:
    """The one line that says why the files differ."""
    said = [f"{label}: {names}" for label, names in _apart(document).items()]
    unequal = [facts for facts in document["blocks"] if not facts["equal"]]
    if unequal:
        worst = max(unequal, key=lambda facts: facts["rel_diff"])
        said.insert(
            0,
            f"{len(unequal)} of {len(document['blocks'])} blocks differ, {worst['name']} by "
            f"{error(worst['rel_diff'])}; --rtol is {document['rtol']:g}",
        )
    return f"{document['b']['path']}: {'; '.join(said)}"
