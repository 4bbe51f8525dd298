"""The hall: model + data + options -> plan -> blocks -> file. The only place where the rooms meet."""

from hesscli.job.options import ComputeOptions, ProblemOptions

__all__ = ["ComputeOptions", "ProblemOptions"]
