"""The command line: reads options, calls a job, prints what it returns. No arithmetic.

Importing this, and so `--help`, loads neither torch nor numpy: each command imports its job when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

import hesscli
from hesscli.cli.compute import compute
from hesscli.cli.eigen import eigen

app = typer.Typer(
    name="hesscli",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(compute)
app.command()(eigen)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hesscli {hesscli.__version__}")
        raise typer.Exit


@app.callback()
def hesscli_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The exact Hessian of a saved PyTorch model.

    \b
    Example:
      hesscli compute model.pt data.npz --blocks diag
      hesscli eigen --top 10
      hesscli compute model.pt data.npz -o - | hesscli eigen - --top 10 --json

    \b
    Exit codes:
      0 done                                    4 model, data and loss do not fit together
      1 a check that you asked for failed       5 numerical: NaN, check failed, not converged
      2 usage, missing file, output refused     6 device missing, not enough memory or disk
      3 file unreadable, unsupported, unsafe    130 Ctrl-C
    """


def main() -> None:
    app()
