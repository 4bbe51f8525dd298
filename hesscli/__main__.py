"""The process of `hesscli`, and of `python -m hesscli`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from hesscli.cli import run
    except KeyboardInterrupt:  # the imports take a tenth of a second
        from hesscli.errors import ExitCode

        sys.stderr.write("error: interrupted\n")
        sys.exit(ExitCode.INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
