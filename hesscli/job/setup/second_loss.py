"""The loss that a model makes of the targets itself, where another one was inferred from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hesscli.errors import DeviceMismatchError, MismatchError
from hesscli.files.models.call_signature import CallSignature
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.outputs import tensors_of
from hesscli.hessian.objective.problem import Problem
from hesscli.job.setup.source import Source

_ROUNDING = 1e-4


def demand_no_other(problem: Problem, source: Source, signature: CallSignature, name: str) -> None:
    """Refuses an inferred loss where the model, given the targets by their `name`, returns one number that is another.

    As one of Hugging Face for language does, which compares scores with the next labels, not with those of their place.
    The MismatchError has both values.
    """
    if name not in signature.names or name in source.inputs or source.target is None:
        return

    def both(batch: Batch) -> tuple[list[Tensor], Tensor]:
        assert batch.target is not None
        keywords = (*batch.keywords, name)
        with_targets = replace(batch, inputs=(*batch.inputs, batch.target), keywords=keywords)
        twice = [_one_number(problem.returned(with_targets)) for _ in range(2)]
        total, count = problem.loss.total(problem.output(batch), batch)
        return [own for own in twice if own is not None], total / count

    try:
        _, (twice, inferred) = source.first_accepted(both)
    except DeviceMismatchError:
        raise
    except MismatchError:  # it makes none; or what is wrong, the first pass of all says, too
        return
    if len(twice) < 2 or not torch.equal(*twice):  # dropout is on, of which the first pass tells
        return
    own = twice[0]
    if not torch.isclose(own, inferred.to(own.dtype), _ROUNDING, 0, True):
        raise MismatchError(
            f"the model makes a loss of {name} itself, {float(own):.4g} for the first samples, where "
            f"{problem.loss.name}, inferred from them, is {float(inferred):.4g}: name the one that is meant",
            "--loss output",
        )


def _one_number(returned: object) -> Tensor | None:
    """What may be a loss in what a model returns: the entry of that name, or the only number."""
    tensors = {"loss": returned} if isinstance(returned, Tensor) else tensors_of(returned)
    candidates = [tensors["loss"]] if "loss" in tensors else tensors.values()
    numbers = [value for value in candidates if not value.dim()]
    return numbers[0] if len(numbers) == 1 else None
