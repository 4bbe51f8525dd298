"""Whether samples mix: whether a model, or a loss, makes something else of samples together than apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hesscli.errors import MismatchError, is_out_of_memory
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.definitions import exact_derivatives, right_gradients
from hesscli.hessian.objective.batch import Batch, Batches, doubled
from hesscli.hessian.objective.losses import OF_CLASSES
from hesscli.hessian.objective.problem import Problem, parameters_at
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.job.options import Note
from hesscli.job.setup.source import Source
from hesscli.widest import wide

_FEWEST = 4  # samples passed together and apart
_SUM = 1e-11  # what sums of many samples in float64 may differ by, where one of them counting for none may not


def what_mixes(
    problem: Problem, source: Source, bounds: Sequence[int], room: int, note: Note
) -> str | None:
    """What makes something else of all samples than of these batches: the model, the loss, or nothing.

    It is tried, with all samples. Where a tape proves that no sample reaches another in the model, all it can miss is
    numbers that depend on a sample's place, or on how many samples there are. Elsewhere, and where the model branches
    on what it computes of its inputs, gradients are compared too, in float64 if possible. Both at theta and a little
    away from there: a gate that is zero, or weights of samples that are all one, hide what is behind them, though not
    from a derivative.

    Args:
        room: how many samples there is memory for at once; if not for all, so many are tried. A batch, if the model
            takes no more at once.
    """
    proven = _proven_apart(problem, source)
    wider = not proven and problem.dtype is not torch.float64
    count = min(source.samples, max(_FEWEST, source.fewest, room // 2 if wider else room))
    tried = [*(b for b in bounds if b < count), count]
    if len(tried) == 2:
        tried.insert(1, count // 2)
    try:
        found = _found_mixing(problem, source, tried, proven, wider)
    except MismatchError:
        if count <= bounds[1]:
            raise
        count = bounds[1]
        found = _found_mixing(problem, source, sorted({0, count // 2, count}), proven, wider)
    own = problem.loss.function is not None and not problem.loss.whole
    if count < source.samples and (own or not proven):
        note(f"whether samples mix was tried with {count} of them; --unbatched takes all at once")
    return found


def _found_mixing(
    problem: Problem, source: Source, tried: Sequence[int], proven: bool, wider: bool
) -> str | None:
    """What makes something else of the first samples than of these parts; MismatchError where not all are taken."""
    bounds = [(0, tried[-1]), *pairwise(tried)]
    # Made anew each time: kept, they would be the data twice.
    batches = Batches(len(bounds), lambda index: source.batch(*bounds[index]))
    if problem.dtype is torch.float64:
        batches = doubled(batches)
    problem = replace(problem, batches=batches)
    if wider:
        problem = problem.double() or problem
    together = problem.batches[0]
    apart = Batches(len(tried) - 1, lambda index: problem.batches[1 + index])
    leaves = list(problem.parameters.values())
    for values in (leaves, _moved(leaves)):
        with (
            torch.set_grad_enabled(not proven),
            right_gradients(),
            parameters_at(leaves, [value.detach() for value in values]),
        ):
            (output,) = _made(problem, [together])
            try:
                outputs = _made(problem, apart)
            except MismatchError:  # it wants more samples, or those it was traced with
                return "the model"
            same = _same_values(output, outputs, _SUM if problem.loss.is_one_number else None)
            if not (same and _same_gradients(output, outputs, leaves)):
                return "the model"
        lengths = [len(each) for each in outputs]
        if (loss := mixing_loss(problem, output, together, lengths, apart)) is not None:
            return loss
    return None


def _made(problem: Problem, batches: Sequence[Batch]) -> list[Tensor]:
    """The outputs of some batches; of a model that returns its loss as one number, what these add up to."""
    outputs = [problem.output(batch) for batch in batches]
    if not problem.loss.is_one_number:
        return outputs
    return [_total(problem, outputs, batches)]


def _total(problem: Problem, outputs: Iterable[Tensor], batches: Sequence[Batch]) -> Tensor:
    """What the loss of the outputs of some batches adds up to, [1]."""
    pairs = zip(outputs, batches, strict=True)
    totals = [problem.loss.total(output, batch)[0] for output, batch in pairs]
    return torch.stack(totals).sum(0, True)


def adds_up(problem: Problem, source: Source, bounds: Sequence[int]) -> bool:
    """Whether what a model returns as its loss is of each sample, as `Loss.reduced` has it: tried in float64, with all
    samples together and in parts within these bounds.
    """
    proven = _proven_apart(problem, source)
    few = replace(problem, batches=[source.batch(0, source.few)])
    wide = few if problem.dtype is torch.float64 else few.double()
    return wide is not None and _found_mixing(wide, source, bounds, proven, wider=False) is None


def _proven_apart(problem: Problem, source: Source) -> bool:
    """Whether each of the first few samples goes its own way through the model, and others go the same way."""
    try:
        few = min(source.samples, max(_FEWEST, source.fewest))
        analysis = Analyses(problem).of(source.batch(0, few))
    except NotApplicable:
        return False
    return not analysis.tape.decided


def _moved(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Parameters, moved by about a hundredth of their size."""
    generator, near = torch.Generator().manual_seed(0), []
    for leaf in leaves:
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        size = float(torch.linalg.vector_norm(leaf.detach())) / max(1, leaf.numel()) ** 0.5
        near.append(leaf.detach() + 1e-2 * (size or 1.0) * noise)
    return near


def what_mixes_in_place(problem: Problem, source: Source, batch: int) -> str | None:
    """The same of a model that does not take any number of samples: whether an output depends on the others' inputs."""
    half = batch // 2
    if not half:
        return None
    first, other = source.batch(0, batch), source.batch(batch, 2 * batch)
    mixed = replace(
        first,
        inputs=tuple(
            torch.cat([a[:half], b[half:]]) for a, b in zip(first.inputs, other.inputs, strict=True)
        ),
    )
    with torch.no_grad():
        alone, beside_others = problem.output(first), problem.output(mixed)
        if not alone.dim() or len(alone) != batch:
            return None
        if not _same_values(alone[:half], [beside_others[:half]]):
            return "the model"
        apart = [source.batch(0, half), source.batch(half, batch)]
        return mixing_loss(problem, alone, first, [half, batch - half], apart)


def mixing_loss(
    problem: Problem,
    output: Tensor,
    together: Batch,
    lengths: Sequence[int],
    apart: Sequence[Batch],
) -> str | None:
    """The loss, if it makes something else of an output together than of its parts, of these lengths, apart."""
    if problem.loss.is_output:
        return None
    if problem.loss.function is None:
        # To PyTorch one distribution.
        of_all = problem.loss.name in OF_CLASSES and output.dim() == 1
        return f"the loss {problem.loss.name}" if of_all else None

    with exact_derivatives(), torch.enable_grad():
        z = output.detach().requires_grad_(output.is_floating_point())
        outputs = z.split(list(lengths))
        if problem.loss.reduced:
            terms = _total(problem, [z], [together])
            parts = [_total(problem, outputs, apart)]
        else:
            terms = problem.loss.terms(z, together)
            parts = [problem.loss.terms(part, of) for part, of in zip(outputs, apart, strict=True)]
        same = _same_values(terms, parts) and _same_loss_derivatives(z, terms, parts)
    return None if same else f"the loss {problem.loss.name}"


def _same_loss_derivatives(z: Tensor, together: Tensor, apart: Sequence[Tensor]) -> bool:
    """Whether a loss's first and second derivatives by outputs z are the same too, in a random direction.

    What couples the samples may be little beside large terms, and still be most of their second derivatives.
    """
    generator = torch.Generator().manual_seed(0)
    seeds, direction = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (together, z)
    )

    def derivatives(terms: Sequence[Tensor]) -> list[Tensor]:
        shares = seeds.split([len(each) for each in terms])
        (slope,) = torch.autograd.grad(terms, z, shares, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return [slope, torch.zeros_like(slope)]
        (bend,) = torch.autograd.grad(slope, z, direction, materialize_grads=True)
        return [slope, bend]

    return all(_same_values(a, [b]) for a, b in _pairs(derivatives, together, apart))


def _same_gradients(together: Tensor, apart: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether gradients by the parameters are the same too, in one random direction of the outputs.

    Batch renormalisation has the values of running statistics, and the derivatives of the batch's own.
    """
    if not together.requires_grad:
        return True
    seeds = torch.randn(together.shape, generator=torch.Generator().manual_seed(0)).to(together)

    def gradients(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        shares = seeds.split([len(each) for each in outputs])
        return torch.autograd.grad(outputs, leaves, shares, materialize_grads=True)

    pairs = _pairs(gradients, together, apart)
    size = _norm([a for a, _ in pairs])
    if together.dtype is not torch.float64:
        # Rounding takes a unit across its kink here and there, which is no mixing.
        return not _norm([a - b for a, b in pairs]) > 1e-2 * size
    least = 1e-10 * size  # one of a bias before a normalisation is nothing but rounding
    return not any(_norm([a - b]) > 1e-6 * _norm([a]) + least for a, b in pairs)


def _pairs(
    derivatives: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    together: Tensor,
    apart: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Each derivative of what was made together, and of the same apart; none where there are none."""
    try:
        found = derivatives([together]), derivatives(apart)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return []  # the gradient of the loss will say why there is none
    return list(zip(*found, strict=True))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(wide(t).norm()) for t in tensors))


def _same_values(together: Tensor, apart: Sequence[Tensor], rounding: float | None = None) -> bool:
    together = together.detach()
    joined = torch.cat([part.detach().reshape(-1) for part in apart])
    if joined.numel() != together.numel():
        return False
    rounding = rounding or (1e-7 if together.dtype is torch.float64 else 1e-4)
    size = float(together.abs().nan_to_num(0, 0, 0).max()) if together.numel() else 0.0
    return torch.allclose(together.reshape(-1), joined, rounding, rounding * size, equal_nan=True)
