"""Proof on a tape that everything after some values is piecewise linear in them."""

from __future__ import annotations

from collections.abc import Sequence

from hesscli.hessian.proofs.sample_rules import LIKELIHOODS, MATRIX_PRODUCTS, RESAMPLING, RESHAPES
from hesscli.hessian.recording.tape import Call, Tape

_LINEAR_OPERATORS = (
    RESHAPES
    | RESAMPLING
    | frozenset(
        "neg sum mean t transpose permute expand unsqueeze squeeze select slice unbind split split_with_sizes "
        "unsafe_split cat stack constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im "
        "roll flip narrow unfold unfold_backward tril triu cumsum index index_select gather scatter scatter_add detach "
        "clone alias contiguous _to_copy _fft_r2c _fft_c2r _fft_c2c real imag view_as_real view_as_complex "
        "complex _conj conj_physical resolve_conj index_put index_add index_copy index_fill slice_scatter "
        "select_scatter diagonal_scatter diagonal diag_embed fill zero lift_fresh add sub rsub new_zeros new_ones "
        "new_full zeros_like ones_like full_like".split()
    )
)
_PIECEWISE = frozenset(
    "relu relu6 leaky_relu hardtanh hardshrink softshrink threshold clamp clamp_min clamp_max abs sign round floor "
    "ceil max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d amax amin "
    "maximum minimum fmax fmin max min median kthvalue cummax cummin aminmax sort topk argmax argmin trunc "
    "scatter_reduce where eq ne lt le gt ge masked_fill nan_to_num".split()
)
# Linear in each argument, so linear in a value that reaches one of them alone.
_MULTILINEAR = MATRIX_PRODUCTS | {"mul", "convolution"}
_LINEAR_IN_FIRST = LIKELIHOODS | {"div"}
_CHOICES = {"where": 0, "masked_fill": 1}  # and which argument the condition is


def curved(tape: Tape, values: Sequence[int]) -> str | None:
    """The first operator after these values that is not piecewise linear in them, or None if there is none."""
    reached = tape.dependent(values)
    for call in tape.calls:
        hits = [n for n in call.reads if n in reached]
        if not hits or is_linear(call, hits):
            continue
        # |z| is a root, and `scatter_reduce` may be a product.
        straight = tape.complex.isdisjoint(hits) and call.named("reduce") != "prod"
        if call.name in _PIECEWISE and straight:
            continue
        return call.name
    return None


def is_linear(call: Call, values: Sequence[int]) -> bool:
    """Whether a call is linear in all these values together, each of which it reads."""
    if call.name in _LINEAR_OPERATORS:
        return True
    if call.name in _CHOICES:  # by a condition, which is none of them
        return call.arguments[_CHOICES[call.name]].value not in values
    alone = len(values) == 1
    return alone and (
        call.name in _MULTILINEAR or (call.name in _LINEAR_IN_FIRST and call.place(values[0]) == 0)
    )


def linear_in(tape: Tape) -> set[int]:
    """The values that a tape's output is linear in together: inputs, and what is made of them in another way."""
    moving, found, met, left = tape.dependent(tape.inputs), set[int](), set[int](), [tape.output]
    while left:
        n = left.pop()
        if n not in moving or n in met:
            continue
        met.add(n)
        call = None if n in tape.inputs else tape.calls[tape.maker[n]]
        mine = [] if call is None else [read for read in call.reads if read in moving]
        if call is not None and is_linear(call, mine):
            left += mine
        else:
            found.add(n)
    return found
