"""How many seconds a command will take: what `--dry-run` says.

The rates of this machine and the time of one gradient are measured; the rest is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hesscli.hessian.planner import Choice, seconds_of
from hesscli.hessian.problem import Problem
from hesscli.hessian.rates import Rates, seconds

START = 0.2  # seconds: what happens once, whatever the model
WRITING = 1e9  # bytes per second
_EIGENVALUES = 1e10  # floating-point operations per second, in LAPACK's symmetric solver


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part of a run."""

    start: float
    work: float
    check: float
    statistics: float
    writing: float

    @property
    def seconds(self) -> float:
        return self.start + self.work + self.check + self.statistics + self.writing


def estimate(
    choices: Sequence[Choice],
    rates: Rates,
    gradients: int,
    gradient: float,
    decomposed: Sequence[int],
    size: int,
) -> Estimate:
    """What a plan takes, in seconds.

    Args:
        choices: the route of each block.
        rates: of this machine.
        gradients: how many the check takes.
        gradient: seconds of one.
        decomposed: the size of each block whose eigenvalues are wanted.
        size: bytes to write.
    """
    return Estimate(
        start=START,
        work=seconds_of(choices, rates),
        check=gradients * gradient,
        statistics=sum(2 * n**3 for n in decomposed) / _EIGENVALUES,
        writing=size / WRITING,
    )


def gradient_seconds(problem: Problem) -> float:
    """One gradient, the faster of two: the first one is slower."""
    return seconds(lambda: problem.gradient(list(problem.parameters)), problem.device, repeats=2)
