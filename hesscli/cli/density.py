"""`hesscli density [HESSIAN | MODEL DATA]`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.commands import on_all_processes, prints, takes_hessian_or_problem
from hesscli.cli.options import Force, refuse_idle_force, written_to
from hesscli.cli.output import Output
from hesscli.cli.summary import spectrum_headline
from hesscli.cli.terminal import encodable
from hesscli.job.json_form import Document
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.processes import Processes
from hesscli.job.sizes import counted
from hesscli.job.starting import start

_EIGHTHS = " ▏▎▍▌▋▊▉█"


@takes_hessian_or_problem("probes", "steps")
@prints
@on_all_processes
def density(
    out: Output,
    processes: Processes,
    hessian: str | ProblemOptions,
    probes: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of a model: random vectors to average over.")
    ] = 10,
    steps: Annotated[
        int,
        typer.Option(
            metavar="M", min=1, help="Of a model: products for each, and vectors to hold."
        ),
    ] = 80,
    output: Annotated[
        Path | None, written_to("Write nodes [k] and weights [k], as .safetensors or .json.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf (needs matplotlib)."),
    ] = None,
    force: Force = False,
) -> None:
    """Print the spectral density: which share of the eigenvalues lies where.

    \b
    Example:
      hesscli density hessian.safetensors
      hesscli density model.pt data.npz --plot density.png

    Exact for a Hessian file, and for a model where that takes no more products than the estimate:
    up to N M parameters, 512 at least and 4096 at most. Elsewhere by stochastic Lanczos quadrature:
    nodes with weights that add up to 1.
    """
    refuse_idle_force(force, "-o density.safetensors", output, plot)
    if not isinstance(hessian, str):
        start()
    from hesscli.job.density import density as run

    document = run(hessian, probes, steps, output, plot, force, out, processes)
    out.result(document, print_density)
    if document["interrupted"]:
        raise KeyboardInterrupt
    for path in (output, plot):
        if path is not None:
            out.wrote(path)


def print_density(out: Output, document: Document) -> None:
    """A histogram with the share of each bin, as bars whose length is the share's logarithm."""
    size = document["size"]
    how = "exact"
    if not document["exact"]:
        how = f"{counted(document['probes'], 'probe')} of {counted(document['steps'], 'step')}"
    out.facts(spectrum_headline(document) | {"density": how})
    edges, mass = document["histogram"]["edges"], document["histogram"]["mass"]
    if not any(mass):
        return
    digits = [_edge(edge, edges) for edge in edges]
    width = max(map(len, digits))
    columns = shutil.get_terminal_size().columns if out.stream.isatty() else 80
    room = max(10, min(columns, 100) - 2 * width - 18)
    plain = not encodable(_EIGHTHS, out.stream)
    out.line(f"{'eigenvalues'.ljust(2 * width + 4)}  {'share'.rjust(8)}  log scale")
    for i, (share, length) in enumerate(zip(mass, lengths(mass, size), strict=True)):
        text = f"{share:.2g}" if share > 0 else "-"
        span = f"{digits[i].rjust(width)} to {digits[i + 1].rjust(width)}"
        out.line(f"{span}  {text.rjust(8)}  {_bar(room * length, plain)}".rstrip())


def lengths(shares: list[float], size: int) -> list[float]:
    """The lengths of bars on a log scale that ends at 1 and begins where every share of a tenth of an eigenvalue shows.

    Less is rounding, or chance.
    """
    least = max(min(share for share in shares if share > 0), 0.1 / size)
    floor = math.floor(math.log10(least) - 1e-9)
    return [max(0.0, 1 - math.log10(share) / floor) if share > 0 else 0.0 for share in shares]


def _edge(edge: float, edges: list[float]) -> str:
    """An edge with as many digits as tell it from the next."""
    step = (edges[-1] - edges[0]) / (len(edges) - 1)
    largest = max(abs(edges[0]), abs(edges[-1]))
    decimals = 1 - math.floor(math.log10(step))
    if decimals > 6 or largest >= 1e6:
        return f"{edge:.{max(1, math.ceil(math.log10(largest / step)))}e}"
    return f"{edge:.{max(0, decimals)}f}"


def _bar(length: float, plain: bool) -> str:
    if plain:
        return "#" * round(length)
    eighths = round(8 * length)
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
