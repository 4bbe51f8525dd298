"""The process of `hesscli` and of `python -m hesscli`."""

from __future__ import annotations

from hesscli.cli import main
from hesscli.job.starting import leave


def run() -> None:
    """Runs the command line and ends the process."""
    try:
        main()
    except SystemExit as status:
        leave(status.code)
        raise


if __name__ == "__main__":
    run()
