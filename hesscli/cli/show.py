"""`hesscli show [HESSIAN]`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.commands import prints
from hesscli.cli.completion import block_names
from hesscli.cli.heatmap import draw, room
from hesscli.cli.options import Markdown, refuse_idle_force
from hesscli.cli.output import Output
from hesscli.cli.summary import COLUMNS, WIDE, print_block, print_hessian
from hesscli.job.json_form import Document

_FIGURE = 1200  # rows and columns of a figure, at most


@prints
def show(
    out: Output,
    hessian: Annotated[
        str,
        typer.Argument(metavar="HESSIAN|-", help="A Hessian file or index; - is standard input."),
    ] = "hessian.safetensors",
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Also mean_eig, negative (how many eigenvalues are), condition, symmetry_error. "
            "What the file lacks is computed for blocks of up to 1536 rows, a quarter of a second "
            "for the largest.",
        ),
    ] = False,
    block: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=block_names,
            help="All that is known of this block; with a picture, of it alone.",
        ),
    ] = None,
    heatmap: Annotated[
        bool,
        typer.Option("--heatmap", help="Draw |H| here. Reads the whole file, in pieces."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw |H| to .png, .svg or .pdf (extra: plot). Reads the whole file, in pieces.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare all that is in the file with its checksums, also if it has more than "
            "64 MB. Reads it whole.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a figure that hesscli did not draw.")
    ] = False,
    markdown: Markdown = False,
) -> None:
    """Print the summary of a Hessian file, draw it, or say all about one block. Loads no torch.

    \b
    Example:
      hesscli show
      hesscli show hessian.safetensors --wide
      hesscli show --block fc1.weight --heatmap
      hesscli show --plot hessian.png
      hesscli show --md >> "$GITHUB_STEP_SUMMARY"
    """
    out.use_markdown(markdown)
    from hesscli.job.show import show as run

    refuse_idle_force(force, "--plot figure.png", plot)
    if plot is not None:
        from hesscli.job.figures import drawable

        plot = drawable(plot, force, () if hessian == "-" else (Path(hessian),))
    drawn = heatmap and not (out.as_json or out.quiet)
    pixels = [*([room(out)] if drawn else []), *([_FIGURE] if plot is not None else [])]
    document, pictures = run(hessian, block, wide, pixels, verify, out.progress)
    table = partial(print_hessian, columns=WIDE if wide else COLUMNS)
    out.result(document, table if block is None else print_block)
    if drawn:
        out.line("")
        draw(out, pictures[0])
    if plot is not None:
        from hesscli.job.figures import MATRICES, plot_matrix

        plot_matrix(plot, pictures[-1], f"{MATRICES[document['curvature']]}, {_title(document)}")
        out.wrote(plot)


def _title(document: Document) -> str:
    loss, blocks, part = document["loss"], document["blocks"], document["structure"]
    if len(blocks) == 1 and part != "full":
        part = f"block {blocks[0]['name']}"
    return f"{part}, {document['total']['size']} rows, {loss['name']}, {document['dtype']}"
