"""Whether samples can be taken apart: whether a model, or a loss, makes the same of some without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hesscli.errors import DeviceMismatchError, MismatchError, is_out_of_memory
from hesscli.files.resources import available_memory
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.definitions import exact_derivatives, right_gradients
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.first_passes import UnrepeatableError
from hesscli.hessian.objective.losses import OF_CLASSES
from hesscli.hessian.objective.problem import Problem, parameters_at
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.job.setup.source import Source

_FEWEST = 4  # samples passed together and apart


def first_accepted(
    function: Callable[[Batch], Tensor], source: Source, counts: Sequence[int]
) -> tuple[Batch, Tensor]:
    """The first so many samples that a function takes, of these numbers of samples in turn, and what it gives.

    Raises:
        MismatchError: it takes none of them; why it does not take the last: a graph's nodes want all others.
        DeviceMismatchError: what it makes lies on another device.
        UnrepeatableError: its passes are not alike.
    """
    refused: MismatchError | None = None
    with torch.no_grad():
        for count in counts:
            if refused and source.bytes * count // source.samples > available_memory() // 8:
                break
            batch = source.part(0, count)
            try:
                return batch, function(batch)
            except (DeviceMismatchError, UnrepeatableError):
                raise
            except MismatchError as error:
                refused = error
    assert refused is not None
    raise refused


def coupled(
    problem: Problem,
    source: Source,
    bounds: Sequence[int],
    room: int,
    note: Callable[[str], None],
) -> str | None:
    """What makes something else of all samples than of these batches: the model, the loss, or nothing.

    It is tried, with all samples. Where a tape proves that no sample reaches another in the model, all it can miss is
    numbers that depend on a sample's place, or on how many samples there are. Elsewhere, and where the model branches
    on what it computes of its inputs, gradients are compared too, in float64 if possible. Both at theta and a little
    away from there: a gate that is zero, or weights of samples that are all one, hide what is behind them, though not
    from a derivative.

    Args:
        problem: the problem, without its batches.
        source: its data.
        bounds: where the batches begin and end.
        room: how many samples there is memory for at once; if not for all, so many are tried. A batch, if the model
            takes no more at once.
        note: hears of that.
    """
    proven = _proven(problem, source)
    wider = not proven and problem.dtype is not torch.float64
    count = min(source.samples, max(_FEWEST, source.fewest, room // 2 if wider else room))
    tried = [*(b for b in bounds if b < count), count]
    if len(tried) == 2:
        tried.insert(1, count // 2)
    try:
        seeing = _seeing(problem, source, tried, proven, wider)
    except MismatchError:
        if count <= bounds[1]:
            raise
        count = bounds[1]
        seeing = _seeing(problem, source, sorted({0, count // 2, count}), proven, wider)
    if count < source.samples and not (proven and problem.loss.function is None):
        note(f"whether samples mix was tried with {count} of them; --unbatched takes all at once")
    return seeing


def _seeing(
    problem: Problem, source: Source, tried: Sequence[int], proven: bool, wider: bool
) -> str | None:
    """What makes something else of the first samples than of these parts of them.

    Raises:
        MismatchError: the model does not take them all at once.
    """
    parts = [source.part(start, stop) for start, stop in pairwise(tried)]
    problem = replace(problem, batches=[source.part(0, tried[-1]), *parts])
    if wider:
        problem = problem.double() or problem
    together, *apart = problem.batches
    leaves = list(problem.parameters.values())
    for values in (leaves, _near(leaves)):
        with (
            torch.set_grad_enabled(not proven),
            right_gradients(),
            parameters_at(leaves, [value.detach() for value in values]),
        ):
            output = problem.output(together)
            try:
                outputs = [problem.output(part) for part in apart]
            except MismatchError:  # it wants more samples, or those it was traced with
                return "the model"
            if not (_same(output, outputs) and _pull_the_same(output, outputs, leaves)):
                return "the model"
        if (loss := _loss_coupled(problem, output, together, outputs, apart)) is not None:
            return loss
    return None


def _proven(problem: Problem, source: Source) -> bool:
    """Whether each of the first few samples goes its own way through the model, and others go the same way."""
    try:
        few = min(source.samples, max(_FEWEST, source.fewest))
        analysis = Analyses(problem).of(source.part(0, few))
    except NotApplicable:
        return False
    return not analysis.tape.decided


def _near(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Parameters, moved by about a hundredth of their size."""
    generator, near = torch.Generator().manual_seed(0), []
    for leaf in leaves:
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        size = float(torch.linalg.vector_norm(leaf.detach())) / max(1, leaf.numel()) ** 0.5
        near.append(leaf.detach() + 1e-2 * (size or 1.0) * noise)
    return near


def coupled_in_place(problem: Problem, source: Source, batch: int) -> str | None:
    """The same of a model that does not take any number of samples: whether an output depends on the others' inputs."""
    half = batch // 2
    if not half or source.samples < 2 * batch:
        return None
    first, other = source.part(0, batch), source.part(batch, 2 * batch)
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
        if not _same(alone[:half], [beside_others[:half]]):
            return "the model"
        apart = [source.part(0, half), source.part(half, batch)]
        return _loss_coupled(problem, alone, first, [alone[:half], alone[half:]], apart)


def _loss_coupled(
    problem: Problem,
    output: Tensor,
    together: Batch,
    outputs: Sequence[Tensor],
    apart: Sequence[Batch],
) -> str | None:
    """The loss, if it makes something else of outputs together than of the same ones apart."""
    if problem.loss.function is None:
        # To PyTorch one distribution.
        of_all = problem.loss.name in OF_CLASSES and output.dim() == 1
        return f"the loss {problem.loss.name}" if of_all else None

    with exact_derivatives(), torch.enable_grad():
        z = output.detach().requires_grad_(output.is_floating_point())
        terms = problem.loss.terms(z, together)
        parts = [
            problem.loss.terms(part, of)
            for part, of in zip(z.split([len(part) for part in outputs]), apart, strict=True)
        ]
        same = _same(terms, parts) and _bend_the_same(z, terms, parts)
    return None if same else f"the loss {problem.loss.name}"


def _bend_the_same(z: Tensor, terms: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a loss's first and second derivatives are alike too, in a random direction, where it has any.

    What couples the samples may be little beside large terms, and still be most of their second derivatives.
    """
    generator = torch.Generator().manual_seed(0)
    seeds, direction = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (terms, z)
    )

    def derivatives(of: Sequence[Tensor]) -> list[Tensor]:
        shares = seeds.split([len(each) for each in of])
        (slope,) = torch.autograd.grad(of, z, shares, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return [slope]
        (bend,) = torch.autograd.grad(slope, z, direction, materialize_grads=True)
        return [slope, bend]

    try:
        whole, summed = derivatives([terms]), derivatives(parts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return True  # the gradient of the loss will say why there is none
    return all(_same(a, [b]) for a, b in zip(whole, summed, strict=True))


def _pull_the_same(output: Tensor, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether derivatives are alike too, in one random direction of the output, where there are any.

    Batch renormalisation has the values of running statistics, and the derivatives of the batch's own.
    """
    if not output.requires_grad:
        return True
    seeds = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    parts = seeds.split([len(part) for part in outputs])
    try:
        whole = torch.autograd.grad(output, leaves, seeds, materialize_grads=True)
        summed = torch.autograd.grad(outputs, leaves, parts, materialize_grads=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return True  # the gradient of the loss will say why there is none
    differences = [a - b for a, b in zip(whole, summed, strict=True)]
    if output.dtype is not torch.float64:
        # Rounding takes a unit across its kink here and there, which is no mixing.
        return not _norm(differences) > 1e-2 * _norm(whole)
    least = 1e-10 * _norm(whole)  # one of a bias before a normalisation is nothing but rounding
    pairs = zip(differences, whole, strict=True)
    return not any(_norm([d]) > 1e-6 * _norm([g]) + least for d, g in pairs)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def _same(together: Tensor, apart: Sequence[Tensor]) -> bool:
    together = together.detach()
    joined = torch.cat([part.detach().reshape(-1) for part in apart])
    if joined.numel() != together.numel():
        return False
    rounding = 1e-7 if together.dtype is torch.float64 else 1e-4
    size = float(together.abs().nan_to_num(0, 0, 0).max()) if together.numel() else 0.0
    return torch.allclose(together.reshape(-1), joined, rounding, rounding * size, equal_nan=True)
