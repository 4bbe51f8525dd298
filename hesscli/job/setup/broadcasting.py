"""Whether a loss of the user's own, or the model's, pairs each sample with every other one, because shapes only fit by
broadcasting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.pairs import broadcast_pair
from hesscli.hessian.recording.recorder import record, record_terms
from hesscli.texts import listed

_Operand = tuple[list[str], torch.Size]  # what it is made of, and its shape


def demand_no_pairs(problem: Problem, batch: Batch, arrays: Mapping[str, Tensor]) -> None:
    """Refuses a loss of the user's own or the model's, that pairs samples.

    Args:
        problem: the problem.
        batch: some of its samples.
        arrays: what of the batch has an entry for each, by what it is called; the model's output aside.

    Raises:
        MismatchError: samples are paired.
    """
    of_model = problem.loss.is_output
    try:
        if of_model:
            every = dict(problem.module.named_parameters())  # also those that were not chosen
            tape = record(replace(problem, parameters=every), batch)
        else:
            with torch.no_grad():
                output = problem.output(batch)
            tape = record_terms(problem.loss, output, batch)
    except NotApplicable:
        return
    if tape.refusal:  # of tensors perhaps that do not lie in one place
        return
    places = {array.data_ptr(): name for name, array in arrays.items()}
    named = {n: places[x.data_ptr()] for n, x in tape.given.items() if x.data_ptr() in places}
    if not of_model:
        outputs = (n for n in tape.inputs if tape.shapes[n][:1] == (len(batch),))
        named |= dict.fromkeys(outputs, "output")
    pair = broadcast_pair(tape, named, len(batch), of_model)
    if pair is None:
        return

    def operand(value: int) -> _Operand:
        if value in named:
            return [named[value]], tape.shapes[value]
        made_of = sorted(name for n, name in named.items() if value in tape.dependent([n]))
        made_of = [f"what it makes of {listed(made_of)}"] if of_model else made_of
        return made_of, tape.shapes[value]

    longer, shorter = map(operand, pair)
    raise _paired("the model" if of_model else f"the loss {problem.loss.name}", longer, shorter)


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
