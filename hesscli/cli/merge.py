"""`hesscli merge [HESSIAN]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesscli.cli.commands import prints
from hesscli.cli.output import Output
from hesscli.cli.summary import print_hessian
from hesscli.job.starting import start


@prints
def merge(
    out: Output,
    hessian: Annotated[
        Path,
        typer.Argument(
            metavar="HESSIAN", help="What the shards were told to write.", readable=False
        ),
    ] = Path("hessian.safetensors"),
) -> None:
    """Finish a file that was computed in shards: check it, and give it its name.

    \b
    Example:
      hesscli compute model.pt data.npz --blocks full --shard 1/2
      hesscli compute model.pt data.npz --blocks full --shard 2/2
      hesscli merge

    Model and data are read again, for the check. The file is read once.
    """
    start()
    from hesscli.job.compute import merge as run
    from hesscli.job.results import written

    out.result(run(hessian, out), print_hessian)
    out.wrote(*written(hessian))
