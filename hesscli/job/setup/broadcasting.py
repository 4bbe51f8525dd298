"""Whether a loss of the user's own, or the model's, pairs each sample with every other one, because shapes only fit by
broadcasting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hesscli.errors import MismatchError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.watcher import Watcher, each
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.pairs import broadcast_pair
from hesscli.hessian.recording.recorder import record
from hesscli.texts import listed

_Operand = tuple[list[str], torch.Size]  # what it is made of, and its shape


class BroadcastWatcher(Watcher):
    """While it is on, finds the operator that pairs the samples of one array with those of another.

    Shapes are aligned at their last axes, so that [N, 1] and [N] make [N, N]. Whoever adds an axis means it, and so
    does whoever compares an array with itself: `time[:, None] <= time`.

    Args:
        arrays: by what they are called; samples lie along the first axis of each.
    """

    def __init__(self, arrays: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._origins = WeakTensorKeyDictionary()  # of what still has the samples there
        for name, array in arrays.items():
            self._origins[array] = {name}
        self._pair: tuple[_Operand, _Operand] | None = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = func(*args, **kwargs)
        operands = [x for x in each([*args, *kwargs.values()], Tensor) if x.dim()]
        pointwise = torch.Tag.pointwise in func.tags
        known = all(x in self._origins for x in operands)
        if not (operands and known and (pointwise or len(operands) == 1)):
            return made
        for longer, shorter in permutations(operands, 2):
            self._compare(longer, shorter)
        axes = max(x.dim() for x in operands)
        if isinstance(made, Tensor) and 0 < made.dim() <= axes and len(made) == len(operands[0]):
            self._origins[made] = set.union(*(self._origins[x] for x in operands))
        return made

    def _compare(self, longer: Tensor, shorter: Tensor) -> None:
        axis = longer.dim() - shorter.dim()  # of the longer, which meets the samples of the shorter
        origins = self._origins[longer], self._origins[shorter]
        if (
            axis > 0
            and longer.shape[axis] == 1 < len(shorter)
            and origins[0].isdisjoint(origins[1])
        ):
            a, b = map(sorted, origins)
            self._pair = self._pair or ((a, longer.shape), (b, shorter.shape))

    def demand_none(self, loss: str) -> None:
        """Raises MismatchError where samples were paired, by the loss of this name."""
        if self._pair is not None:
            raise _paired(f"the loss {loss}", *self._pair)


def demand_no_pairs(problem: Problem, batch: Batch, arrays: Mapping[str, Tensor]) -> None:
    """The same of a model that returns its loss, or of a loss that takes all that a model returns."""
    every = dict(problem.module.named_parameters())  # also those that were not chosen
    try:
        tape = record(replace(problem, parameters=every), batch)
    except NotApplicable:
        return
    if tape.refusal:  # of tensors perhaps that do not lie in one place
        return
    places = {array.data_ptr(): name for name, array in arrays.items()}
    named = {n: places[x.data_ptr()] for n, x in tape.given.items() if x.data_ptr() in places}
    pair = broadcast_pair(tape, named, len(batch))
    if pair is None:
        return

    def operand(value: int) -> _Operand:
        if value in named:
            return [named[value]], tape.shapes[value]
        made_of = sorted(name for n, name in named.items() if value in tape.dependent([n]))
        return [f"what it makes of {listed(made_of)}"], tape.shapes[value]

    longer, shorter = map(operand, pair)
    raise _paired("the model", longer, shorter)


def _paired(what: str, longer: _Operand, shorter: _Operand) -> MismatchError:
    axes = f"[:{', None' * (len(longer[1]) - len(shorter[1]))}]"
    return MismatchError(
        f"{what} broadcasts {_text(longer)} and {_text(shorter)}, "
        "which pairs each sample with every other one",
        f"write {_indexed(shorter, axes)}; or {_indexed(shorter, '[None]')} if all pairs are meant",
    )


def _text(operand: _Operand) -> str:
    names, shape = operand
    return f"{listed(names)} [{', '.join(['N', *map(str, shape[1:])])}]"


def _indexed(operand: _Operand, index: str) -> str:
    names = (name if name.isidentifier() else f"({name})" for name in operand[0])
    return listed([name + index for name in names])
