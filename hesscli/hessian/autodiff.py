"""Reverse passes: in any mode of the caller, and without what `torch.autograd.grad` imports for given seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesscli.errors import is_out_of_memory
from hesscli.gradients import gradients_on
from hesscli.hessian.guests import is_missing_derivative, on_host


@contextmanager
def differentiable() -> Iterator[None]:
    """Derivatives are taken, of all digits, also in `torch.no_grad`, `torch.inference_mode` or `torch.autocast`.

    So they are where the caller's default device is a GPU, which does not draw from a generator of the CPU.
    """
    with on_host(), _hooks_put_aside(), gradients_on():
        yield


@contextmanager
def _hooks_put_aside() -> Iterator[None]:
    """Inside, autograd saves tensors as they are: the caller's `saved_tensors_hooks` may round them, or move them.

    What such a hook gives back has no second derivatives, and rounded gradients have no differences.
    """
    stack: Any = torch._C._autograd
    hooks = []
    while (top := stack._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        stack._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            stack._push_saved_tensors_default_hooks(pack, unpack)


def unit_rows(like: Tensor, first: int, count: int, size: int) -> Tensor:
    """Rows of the identity matrix from `first` on, as seeds: [count, size]."""
    rows = like.new_zeros(count, size)
    rows[:, first : first + count].fill_diagonal_(1)
    return rows


def batched_grad(
    output: Tensor | GradientEdge, inputs: Sequence[Tensor], seeds: Tensor
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian products of all seeds in one pass: seeds [k, *output.shape] -> [k, *input.shape] each.

    The same as `torch.autograd.grad(output, inputs, seeds, is_grads_batched=True, retain_graph=True,
    allow_unused=True)`, whose check of the seeds' shape imports PyTorch's symbolic shapes, and with them sympy: 0.4
    s, more than many a Hessian takes. Where the internals that it stands on have moved, that is what is called.
    Where an operator cannot be batched, seeds go one by one.
    """
    try:
        from torch._vmap_internals import _vmap
    except ImportError:
        return torch.autograd.grad(
            output, inputs, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
        )

    def backward(seed: Tensor) -> tuple[Tensor | None, ...]:
        return seeded_grad(output, inputs, seed)

    try:
        found = _vmap(backward, 0, 0, allow_none_pass_through=True)(seeds)
    except Exception as error:  # whatever an operator's rule, or a `Function`, makes of a batch
        if is_missing_derivative(error) or is_out_of_memory(error):
            raise
        rows = [seeded_grad(output, inputs, seed) for seed in seeds]
        found = [None if row[0] is None else torch.stack(row) for row in zip(*rows, strict=True)]
    # Autograd's symbolic zeros cannot be written to; like None, they mean that nothing depends on the input.
    return tuple(None if x is None or x._is_zerotensor() else x for x in found)


def batched_rows(output: Tensor, inputs: Sequence[Tensor], seeds: Tensor) -> Tensor:
    """The same as rows, input after input, with zeros where nothing depends on one: [k, entries of all inputs]."""
    return as_rows(batched_grad(output, inputs, seeds), inputs, seeds)


def as_rows(found: Sequence[Tensor | None], inputs: Sequence[Tensor], seeds: Tensor) -> Tensor:
    """What was found for all seeds, [k, *input.shape] each or None for zeros, as such rows."""
    rows = [
        seeds.new_zeros(len(seeds), x.numel()) if part is None else part.reshape(len(seeds), -1)
        for part, x in zip(found, inputs, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def seeded_grad(
    output: Tensor | GradientEdge, inputs: Sequence[Tensor], seed: Tensor
) -> tuple[Tensor | None, ...]:
    """The same for one seed [*output.shape] -> [*input.shape] each, and as soon."""
    try:
        from torch.autograd.graph import _engine_run_backward
    except ImportError:
        return torch.autograd.grad(output, inputs, seed, retain_graph=True, allow_unused=True)
    return _engine_run_backward(
        (output,), (seed,), True, False, tuple(inputs), True, accumulate_grad=False
    )


def graph_of(output: Tensor) -> list[Any]:
    """The nodes of autograd's graph that lead to an output."""
    nodes: list[Any] = [] if output.grad_fn is None else [output.grad_fn]
    known = set(nodes)
    for node in nodes:
        more = {one for one, _ in node.next_functions if one is not None} - known
        known |= more
        nodes += more
    return nodes
