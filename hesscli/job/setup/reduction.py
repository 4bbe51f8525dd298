"""What a loss that is one number is of: the mean, or the sum, of what it makes of each sample; or all of them at once.

It is tried with all samples: together, and in parts of one, two, four of them, and so on, in float64.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.files.resources import available_memory
from hesscli.hessian.aten.precision import in_precision
from hesscli.hessian.chunk_sizes import ranges
from hesscli.hessian.objective.batch import doubled
from hesscli.hessian.objective.loss import MEAN, OF_ALL, SUM
from hesscli.hessian.objective.problem import Problem
from hesscli.job.setup.mixing import adds_up, mixing_loss
from hesscli.job.setup.source import Source
from hesscli.widest import widest

_MOST = 256  # samples of a pass
_TRIED = 16  # bytes of an output: in float64, and as it was


def reduction(problem: Problem, source: Source, width: int, room: int) -> str:
    """`MEAN` or `SUM` of what the loss makes of each sample, or `OF_ALL`.

    Args:
        width: how many numbers the model gives for a sample.
        room: how many samples there is memory for at once.
    """
    if (source.fewest, source.most) != (1, None) or widest(source.device) is not torch.float64:
        return OF_ALL
    try:
        if problem.loss.is_output:
            return _of_output(problem, source, room)
        return _of_function(problem, source, width)
    except MismatchError:  # it does not take so few, or not in float64
        return OF_ALL


def _of_function(problem: Problem, source: Source, width: int) -> str:
    """The same of the user's own, of outputs as they are and near them.

    What it leaves out or weighs differently shows in the derivatives by one of the outputs.
    """
    if max(source.bytes, _TRIED * width * source.samples) > available_memory() // 8:
        return OF_ALL
    passes = (source.batch(some.start, some.stop) for some in ranges(source.samples, _MOST))
    with torch.no_grad():
        outputs = [problem.output(batch) for batch in passes]
    kinds = {x.shape[1:] if x.dim() and x.is_floating_point() else None for x in outputs}
    if None in kinds or len(kinds) > 1:
        return OF_ALL
    whole, parts = (0, source.samples), pairwise(_parts(source))
    together, *apart = doubled([source.batch(*part) for part in [whole, *parts]])
    loss, output = problem.loss.doubled(), in_precision(torch.cat(outputs), torch.float64)
    rows, left = divmod(len(output), source.samples)
    lengths = [rows * len(batch) for batch in apart]
    for reduced in (MEAN, SUM) if not left else ():
        tried = replace(problem, loss=replace(loss, reduced=reduced))
        near = (output, _moved(output))
        if not any(mixing_loss(tried, z, together, lengths, apart) for z in near):
            return reduced
    return OF_ALL


def _of_output(problem: Problem, source: Source, room: int) -> str:
    """The same of what the model returns, at the weights and near them."""
    if source.samples > (room if problem.dtype is torch.float64 else room // 2):
        return OF_ALL
    for reduced in (MEAN, SUM):
        tried = replace(problem, loss=replace(problem.loss, reduced=reduced))
        if adds_up(tried, source, _parts(source)):
            return reduced
    return OF_ALL


def _parts(source: Source) -> list[int]:
    """Where parts of one, two, four samples and so on begin and end."""
    bounds = [0]
    while bounds[-1] < source.samples:
        bounds.append(min(source.samples, 2 * bounds[-1] + 1))
    return bounds


def _moved(output: Tensor) -> Tensor:
    """Each number less up to a tenth of it: probabilities are below one still, and variances positive."""
    less = torch.rand(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    return output * (1 - 0.1 * less.to(output.device))
