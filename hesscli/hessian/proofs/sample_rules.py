"""What each operator does to the sample axis: one rule for each kind of operator.

Composite operators, like `flatten`, are seen whole in inference mode alone; elsewhere autograd takes them apart.
"""

from __future__ import annotations

from dataclasses import replace

from hesscli.hessian.proofs import sample_moves as moves
from hesscli.hessian.proofs import sample_writes as writes
from hesscli.hessian.proofs.sample_axis import Context, MayMix, Rule, SampleAxis
from hesscli.hessian.recording.tape import Call

ELEMENTWISE_UNARY = frozenset(
    "relu tanh sigmoid gelu silu mish elu celu softplus leaky_relu hardtanh hardswish hardshrink softshrink "
    "threshold clamp clamp_min clamp_max abs neg exp expm1 log log1p log2 log10 sqrt rsqrt square pow sin cos tan "
    "asin acos atan sinh cosh asinh acosh atanh erf erfc reciprocal sign log_sigmoid_forward selu logit "
    "detach clone alias contiguous _to_copy lift_fresh zeros_like ones_like full_like nan_to_num round floor ceil "
    "logical_not bitwise_not isnan positive relu6 trunc frac sinc lgamma digamma erfinv "
    "exp2 signbit i0 special_entr special_erfcx special_log_ndtr special_ndtri special_i0e special_i1 "
    "special_i1e sgn isinf mvlgamma special_bessel_j0 special_bessel_j1".split()
)
_ELEMENTWISE = frozenset(  # of several tensors, or of one and numbers
    "add sub mul div rsub where maximum minimum fmax fmin atan2 eq ne lt le gt ge logical_and logical_or "
    "bitwise_and bitwise_or masked_fill lerp addcmul addcdiv xlogy logaddexp copy "
    "fmod remainder hypot copysign logaddexp2 special_xlog1py special_zeta complex polar "
    "tanh_backward sigmoid_backward bitwise_xor bitwise_left_shift bitwise_right_shift heaviside ldexp igamma igammac "
    "polygamma".split()
)
_REDUCTION = frozenset(
    "sum mean amax amin prod var std logsumexp max min argmax argmin norm linalg_vector_norm any all "
    "var_mean std_mean aminmax median kthvalue mode nansum count_nonzero".split()
)
_ALONG = frozenset(
    "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum cumprod cummax cummin sort topk "
    "flip roll rot90 _fft_r2c _fft_c2r _fft_c2c linalg_cross".split()
)
# Between real and complex numbers: an axis that comes or goes is the last.
_COMPLEX = frozenset(
    "real imag angle view_as_real view_as_complex _conj conj_physical resolve_conj".split()
)
# Of each channel's picture, which is the last one, two or three axes: as the name says.
RESAMPLING = frozenset(
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d".split()
)
_PICTURE = RESAMPLING | frozenset(
    "max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d adaptive_max_pool2d "
    "adaptive_max_pool3d".split()
)
_MATRIX = frozenset(
    "tril triu linalg_cholesky_ex linalg_inv_ex linalg_qr linalg_matrix_exp linalg_lu_factor_ex _linalg_det "
    "_linalg_slogdet _linalg_eigh _linalg_svd affine_grid_generator col2im".split()
)
# How many of the last axes an operator works on, of each picture or matrix of a batch; None: all but the first.
_LAST: dict[str, int | None] = {
    **{name: next(int(letter) for letter in name if letter.isdigit()) for name in _PICTURE},
    **dict.fromkeys(_MATRIX, 2),
    **dict.fromkeys(("im2col", "pixel_shuffle", "pixel_unshuffle"), 3),
    "channel_shuffle": None,
}
# Of each pair of matrices.
_PAIRS = frozenset(
    "_linalg_solve_ex linalg_solve_triangular cholesky_solve grid_sampler_2d grid_sampler_3d".split()
)
# Which of the two has columns.
_SOLVED = {"_linalg_solve_ex": 1, "linalg_solve_triangular": 1, "cholesky_solve": 0}
# Losses, which give a term for each number unless they are told to reduce.
LOSS_OPERATORS = frozenset(
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss".split()
)
LIKELIHOODS = frozenset("nll_loss_forward nll_loss2d_forward".split())
# A fresh tensor in the likeness of another, whose numbers it does not take.
CONSTANT = frozenset("new_zeros new_ones new_full zero fill".split())
MATRIX_PRODUCTS = frozenset("mm addmm bmm baddbmm".split())
RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias flatten unflatten".split())


def _elementwise(c: Context) -> SampleAxis:
    """All arguments broadcast against each other: their sample axes must fall on the same axis of the result."""
    rank = len(c.result)
    return c.one(
        replace(axis, axis=axis.axis + rank - len(c.shapes[value]))
        for value in c.call.reads
        if (axis := c.axes[value])
    )


def _reduction(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    dims = c.dims(c.named("dim"), rank)
    left = c.reduced(axis, dims)
    return axis if len(c.result) == rank else left


def _along(c: Context) -> SampleAxis | None:
    axis = _elementwise(c)
    name = "dims" if c.call.name in ("flip", "roll", "rot90") else "dim"
    c.require(axis.axis not in c.dims(c.named(name), len(c.result)))
    return axis


def _of_last(c: Context) -> SampleAxis | None:
    axis, rank = c.one(c.axes[n] for n in c.call.reads), len(c.shape())
    c.require(axis.axis < rank - (_LAST[c.call.name] or rank - 1))
    return axis


def _of_pair(c: Context) -> SampleAxis | None:
    """Both are batches with samples along their first axis, or only one; with matrices, the second may have vectors.

    Or the samples are columns that are solved for one by one.
    """
    first, second = c.axis(0), c.axis(1)
    if (place := _SOLVED.get(c.call.name)) is not None and c.axis(1 - place) is None:
        axis, rank = c.only(place), len(c.shape(place))
        left = c.call.name == "cholesky_solve" or c.named("left")
        if left and axis.axis == rank - 1 and rank == len(c.shape(1 - place)) == len(c.result):
            return axis
    axis = c.one((first, second))
    ranks = [len(c.shape(i)) for i, of in enumerate((first, second)) if of is not None]
    vectors = c.call.name == "_linalg_solve_ex" and ranks == [3, 2]
    c.require(axis.axis == 0 and (min(ranks) > 2 or vectors))
    return axis


def _distances(c: Context) -> SampleAxis | None:
    """[..., P, M] and [..., R, M] -> [..., P, R]: of each pair of rows."""
    axes = {}
    for argument, place in ((0, 2), (1, 1)):
        axis, rank = c.axis(argument), len(c.shape(argument))
        if axis is not None:
            at = axis.axis - rank
            c.require(at != -1)
            axes[argument] = replace(axis, axis=len(c.result) + (-place if at == -2 else at))
    first, *others = axes.values()
    c.require(not others or (others == [first] and first.axis < len(c.result) - 2))
    return first


def _convolved(c: Context) -> SampleAxis | None:
    """Samples lie along the first axis; or along the channels, in groups, with kernels of their own perhaps."""
    axis, *own = (c.axis(i) for i in range(3))
    if axis is not None and not any(own) and (axis.axis == 0 or (axis.axis > 1 and _pointwise(c))):
        return axis
    places = [each for each in (axis and replace(axis, axis=axis.axis - 1), *own) if each]
    outer = places[0].outer
    c.require(all((each.axis, each.outer) == (0, outer) for each in places))
    c.require(c.named("groups") % (outer * c.samples) == 0)
    return SampleAxis(1, outer, c.result[1] // (outer * c.samples))


def _renormed(c: Context) -> SampleAxis | None:
    """Each slice along an axis by itself."""
    axis = c.only()
    c.require(c.along == {axis.axis})
    return axis


def _pointwise(c: Context) -> bool:
    """Whether a convolution sees one place at a time."""
    kernel, stride = c.shape(1)[2:], c.named("stride")
    padding = [*c.named("padding"), *c.named("output_padding")]
    return set(kernel) | set(stride) == {1} and not any(padding)


def _product(c: Context) -> SampleAxis | None:
    """Samples lie along the rows of the first matrix, the columns of the second, or the batch of both or of one.

    What is added has them where the product has them, or none.
    """
    batched, shift = int("bmm" in c.call.name), int("add" in c.call.name)
    left, right = c.axis(shift), c.axis(shift + 1)
    found = {axis for axis in (left, right) if axis is not None}
    if len(found) != 1:
        raise MayMix(c.call)
    axis = found.pop()
    alone = left is None or right is None
    rows_or_columns = alone and axis.axis == (batched if right is None else batched + 1)
    c.require(rows_or_columns or (batched == 1 and axis.axis == 0))
    added = c.axis(0) if shift else None
    c.require(added is None or (added == axis and len(c.shape(0)) == len(c.result)))
    return axis


def _overlapped(c: Context) -> SampleAxis | None:
    """Windows, along the last axis, are added where they lie along another, as `istft` does."""
    axis, rank = c.only(), len(c.result)
    c.require(axis.axis not in (c.named("dim") % rank, rank))
    return axis


def _searched(c: Context) -> SampleAxis | None:
    """In a table, the first argument: the same for all samples, or each sample's own along the last axis."""
    if c.axis(0) is None:
        return c.only(1)
    axis = c.one((c.axis(0), c.axis(1)))
    c.require(axis.axis < len(c.shape()) - 1 and c.named("sorter") is None)
    return axis


def _trilinear(c: Context) -> SampleAxis | None:
    """As `nn.Bilinear` calls it: [B, i], [o, i, j], [B, j] -> [B, o]."""
    names, bilinear = ("expand1", "expand2", "expand3", "sumdim"), ((1, 3), (0,), (1, 2), (2, 3))
    axis = c.one((c.axis(0), c.axis(2)))
    dims = tuple(tuple(c.named(name)) for name in names)
    c.require(dims == bilinear and c.axis(1) is None and axis.axis == 0)
    return axis


def _loss(c: Context) -> SampleAxis | None:
    c.require(c.named("reduction") == 0)
    return terms_of(c)


def terms_of(c: Context) -> SampleAxis:
    """Of the terms that a loss makes, also where it returns their sum or mean alone."""
    return _elementwise(c) if c.call.name in LOSS_OPERATORS else _likelihood(c)


def _likelihood(c: Context) -> SampleAxis:
    """One of the classes along the second axis, which goes."""
    axis, target = c.axis(0), c.axis(1)
    if axis is None or axis.axis == 1:
        raise MayMix(c.call)
    made = replace(axis, axis=axis.axis - (axis.axis > 1))
    c.require(target in (None, made))
    return made


def _constant(c: Context) -> SampleAxis | None:
    """The first argument gives its shape; a number to fill it with must be the same for all samples."""
    c.require(c.axis(1) is None)
    return None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTION, _reduction),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(CONSTANT, _constant),
    **dict.fromkeys(LOSS_OPERATORS | LIKELIHOODS, _loss),
    **dict.fromkeys(RESHAPES, moves.reshaped),
    **dict.fromkeys(("t", "transpose", "permute"), moves.transposed),
    **dict.fromkeys(MATRIX_PRODUCTS, _product),
    "_trilinear": _trilinear,
    **dict.fromkeys(_LAST, _of_last),
    **dict.fromkeys(_PAIRS, _of_pair),
    "embedding": lambda c: c.only(1),  # of a table that is the same for all samples
    "searchsorted": _searched,
    **dict.fromkeys(_COMPLEX | {"bucketize", "isin"}, Context.only),
    "convolution": _convolved,
    "renorm": _renormed,
    "unfold_backward": _overlapped,
    "_euclidean_dist": _distances,
    **dict.fromkeys(("cat", "stack"), moves.joined),
    **dict.fromkeys(("slice", "narrow", "narrow_copy"), moves.sliced),
    **dict.fromkeys(
        "split split_with_sizes unsafe_split unsafe_chunk glu index_select unfold".split(),
        moves.along_another,
    ),
    **dict.fromkeys(("select", "unbind", "diagonal"), moves.selected),
    "diag_embed": moves.diagonal_embedded,
    **dict.fromkeys("gather scatter scatter_add scatter_reduce".split(), moves.by_position),
    "index": moves.indexed,
    "index_put": writes.put,
    **dict.fromkeys(("index_add", "index_copy", "index_fill"), writes.by_index),
    "slice_scatter": writes.into_slice,
    **dict.fromkeys(("select_scatter", "diagonal_scatter"), writes.into_selection),
    "expand": moves.expanded,
    "unsqueeze": moves.unsqueezed,
    "squeeze": moves.squeezed,
    "constant_pad_nd": moves.padded,
    **dict.fromkeys(_ELEMENTWISE | ELEMENTWISE_UNARY, _elementwise),
}


def rule_of(call: Call) -> Rule:
    """The rule of an operator; without one it counts as mixing."""
    if call.operator.namespace != "aten" or call.name not in _RULES:
        raise MayMix(call)
    return _RULES[call.name]
