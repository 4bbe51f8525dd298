"""The process of `hesscli`, and of `python -m hesscli`."""

from __future__ import annotations

import os
import sys

_FEW_CORES = 4


def main() -> None:
    _wait_asleep()
    try:
        from hesscli.cli import run
    except KeyboardInterrupt:  # the imports take a tenth of a second
        from hesscli.errors import ExitCode

        sys.stderr.write("error: interrupted\n")
        sys.exit(ExitCode.INTERRUPTED)
    run()


def _wait_asleep() -> None:
    """On a machine of few cores, threads that wait for each other do so asleep. OpenMP asks when torch is imported.

    By default they spin, and so keep a core from the thread that they wait for as soon as other processes compute, too.
    On two cores of which one was busy, products with the Hessian of a small convolution took 20 to 150 times as long.
    On two idle ones nothing is lost.
    """
    if (os.cpu_count() or 1) <= _FEW_CORES:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


if __name__ == "__main__":
    main()
