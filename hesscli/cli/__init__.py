"""The command line: reads options, calls a job, prints what it returns. No arithmetic.

Importing this, and so `--help`, loads neither torch nor numpy: each command imports its job when it
runs.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import hesscli
from hesscli.cli.compute import compute
from hesscli.cli.density import density
from hesscli.cli.diff import diff
from hesscli.cli.eigen import eigen
from hesscli.cli.failing import report, report_usage
from hesscli.cli.hvp import hvp
from hesscli.cli.merge import merge
from hesscli.cli.show import show
from hesscli.cli.trace import trace
from hesscli.errors import ExitCode
from hesscli.job.setup.team import rank
from hesscli.job.starting import leave

# What typer raises for a command line that it cannot read; it has no public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_ON_ALL_PROCESSES = {"compute", "eigen", "trace", "density", "hvp"}
"""Commands for several processes; all others are those of the first alone."""

app = typer.Typer(
    name="hesscli",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command(short_help="Write the Hessian of a saved model's loss to a file.")(compute)
app.command(short_help="Print the first eigenvalues of a Hessian file or of a model.")(eigen)
app.command(short_help="Print the trace of a model's Hessian, by tensor.")(trace)
app.command(short_help="Print the spectral density of a Hessian file or of a model.")(density)
app.command(short_help="Write products of a model's Hessian with vectors.")(hvp)
app.command(short_help="Finish a file that was computed in shards.")(merge)
app.command(short_help="Print the summary of a Hessian file, or draw it.")(show)
app.command(short_help="Compare two Hessian files; exit 1 when they differ.")(diff)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hesscli {hesscli.__version__}")
        raise typer.Exit


def _schema(command: str | None) -> None:
    if command is None:
        return
    import json

    from hesscli.schemas import commands, schema

    if command not in commands():
        raise typer.BadParameter(f"{command!r} is none of {', '.join(commands())}")
    typer.echo(json.dumps(schema(command), indent=2))
    raise typer.Exit


@app.callback(invoke_without_command=True)
def hesscli_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    schema: Annotated[
        str | None,
        typer.Option(
            "--schema",
            metavar="COMMAND",
            callback=_schema,
            is_eager=True,
            help="Print the JSON Schema of what COMMAND --json prints.",
        ),
    ] = None,
) -> None:
    """The exact Hessian of a saved PyTorch model.

    \b
    Example:
      hesscli compute model.pt data.npz --blocks diag
      hesscli eigen --top 10
      hesscli eigen model.pt data.npz --top 10
      hesscli compute model.pt data.npz -o - | hesscli eigen - --top 10 --json

    \b
    Exit codes:
      0    done
      1    a check that you asked for failed
      2    usage, missing file, output refused
      3    file unreadable, unsupported or unsafe
      4    model, data and loss do not fit together
      5    numerical: NaN, not twice differentiable, check failed, not converged
      6    device missing, not enough memory or disk
      70   a bug in hesscli
      130  Ctrl-C
    """
    if rank() and context.invoked_subcommand not in _ON_ALL_PROCESSES:
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


def main() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as `>&-` does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        if "" in sys.argv[1:]:  # a path that is empty would be the current folder
            raise _UsageError("an argument is empty: is a variable not set?")
        sys.exit(app(standalone_mode=False))
    except _UsageError as error:
        sys.exit(report_usage(error))
    except OSError as error:  # of printing --help, say: commands report their own
        sys.exit(report(error))
    except SystemExit as status:
        if isinstance(status.__context__, BrokenPipeError):  # the same, made a code by typer
            sys.exit(report(status.__context__))
        raise


def run() -> None:
    """The process of `hesscli`: runs the command line, and ends with it."""
    try:
        main()
    except SystemExit as status:
        leave(status.code)
        raise
    except KeyboardInterrupt as error:  # before a command has begun
        raise SystemExit(report(error)) from None
