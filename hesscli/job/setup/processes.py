"""The processes that have the data: here, this one alone. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hesscli.job.setup.team import Team

if TYPE_CHECKING:
    import torch

    from hesscli.hessian.differences.check import Certificate
    from hesscli.hessian.objective.problem import Problem
    from hesscli.hessian.operator import LinearMap
    from hesscli.job.options import Listener, ProblemOptions
    from hesscli.job.setup.opening import Opened


class Processes:
    """This process, which has all of the data; `ManyProcesses` has a share of it.

    Args:
        team: others that have all of the data too, and so see alike whether its samples mix.
        side_by_side: threads will work on batches side by side, as they do for products.
    """

    size = 1  # that share the data

    def __init__(self, team: Team | None = None, side_by_side: bool = True) -> None:
        self.team = team or Team(alone=True)
        self.side_by_side = side_by_side

    def open(self, options: ProblemOptions, listener: Listener) -> Opened:
        """The problem with all the data."""
        from hesscli.job.setup.opening import open_problem

        return open_problem(options, listener, self)

    def share_of(self, problem: Problem) -> Problem:
        """The problem with this process's share of the batches."""
        return problem

    def agreed(self, said: Any) -> list[Any]:
        """What each process says."""
        return self.team.all_gather(said)

    def totals(self, total: float, denominator: float) -> tuple[float, float]:
        """The sums of both over all processes."""
        return total, denominator

    def problem(self, opened: Opened, index: int = 0) -> Problem:
        """An opened problem, the one of this number, whose gradients are sums over all processes."""
        return opened.problem

    def double(self, opened: Opened) -> Problem | None:
        """The same in float64, for checks and for differences; None if the model does not run in it."""
        return opened.double

    def products(self, problem: Problem, curvature: str, rows: int) -> LinearMap:
        """Products that are sums over all processes."""
        from hesscli.hessian.curvatures import CURVATURES
        from hesscli.job.setup.batches import free_memory

        return CURVATURES[curvature].products(problem, free_memory(problem.device) // 2, rows)

    def let_go(self) -> None:
        """Frees what other processes keep for products."""

    def certificate(
        self, problem: Problem, dtype: torch.dtype, seed: int, curvature: str
    ) -> Certificate:
        """What checks a curvature over the data of all processes."""
        from hesscli.hessian.curvatures import CURVATURES

        return CURVATURES[curvature].certificate(problem, dtype, seed)
