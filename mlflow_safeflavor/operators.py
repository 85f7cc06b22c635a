"""What a graph may call: pure functions of tensors and of sizes, by name, with the types of their arguments.

A name from a file is only ever looked up in the table below; nothing is imported, evaluated or found by it otherwise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

__all__ = ["KEPT_FALSE", "SIZES", "WITHOUT_DROPOUT", "Signature", "allowed", "signature_of"]


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes are 64-bit numbers: products of products would fill the memory with their digits."""

    def checked(*args: Any) -> Any:
        result = function(*args)
        if isinstance(result, int) and not -(2**63) <= result < 2**63:
            raise OverflowError(f"a size of {result.bit_length()} bits")
        return result

    return checked


SIZES: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": _bounded(f) for f in (operator.add, operator.sub, operator.mul, operator.neg)},
    **{f"operator.{f.__name__}": f for f in (operator.floordiv, operator.truediv, operator.mod)},
    **{f"operator.{f.__name__}": f for f in (operator.eq, operator.ne, operator.lt, operator.le)},
    **{f"operator.{f.__name__}": f for f in (operator.gt, operator.ge, operator.and_, operator.or_)},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)},
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
}
"""Arithmetic on sizes: of whole numbers, truth values, and fractions on the way to whole numbers."""

_ATEN = """
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Tensor _adaptive_avg_pool2d.default
_softmax.default _weight_norm.default _log_softmax.default _to_copy.default _unsafe_view.default
_native_batch_norm_legit_no_training.default _scaled_dot_product_flash_attention_for_cpu.default
abs.default acos.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default
add.Scalar add.Tensor addcmul.default addmm.default alias.default all.default all.dim amax.default amin.default
any.default any.dim arange.default arange.start arange.start_step argmax.default argmin.default argsort.default
argsort.stable asin.default atan.default atan2.default avg_pool1d.default avg_pool2d.default baddbmm.default
batch_norm.default bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor
bitwise_xor.Tensor bmm.default broadcast_tensors.default bucketize.Tensor cat.default ceil.default celu.default
channel_shuffle.default chunk.default clamp.default clamp.Tensor clamp_max.default clamp_max.Tensor clamp_min.default
clamp_min.Tensor clone.default column_stack.default concat.default constant_pad_nd.default contiguous.default
conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default
conv_transpose2d.input convolution.default copy.default cos.default cosh.default cross.default cummax.default
cumprod.default cumsum.default detach.default diag.default diag_embed.default diagonal.default diff.default
div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode dot.default einsum.default elu.default embedding.default
eq.Scalar eq.Tensor erf.default exp.default exp2.default expand.default expand_as.default expm1.default eye.default
eye.m fft_fft.default fft_fft2.default fft_fftn.default fft_irfft.default fft_irfftn.default fft_rfft.default
fft_rfftn.default fill.Scalar flatten.using_ints flip.default floor.default floor_divide.default
floor_divide.Scalar fmod.Scalar fmod.Tensor frac.default frobenius_norm.dim full.default full_like.default
gather.default ge.Scalar ge.Tensor gelu.default glu.default grid_sampler.default grid_sampler_2d.default
group_norm.default gt.Scalar gt.Tensor hann_window.default hann_window.periodic hardsigmoid.default hardswish.default
hardtanh.default im2col.default imag.default index.Tensor index_add.default index_copy.default index_put.default
index_select.default instance_norm.default isfinite.default isinf.default isnan.default layer_norm.default le.Scalar
le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lift_fresh_copy.default linalg_norm.default
linalg_vector_norm.default linear.default linspace.default log.default log10.default log1p.default log2.default
log_sigmoid.default log_softmax.int logaddexp.default logical_and.default logical_not.default logical_or.default
logical_xor.default logspace.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
masked_scatter.default masked_select.default matmul.default max.default max.dim max.other max_pool1d.default
max_pool2d.default maximum.default mean.default mean.dim meshgrid.default meshgrid.indexing min.default min.dim
min.other minimum.default mish.default mm.default movedim.int movedim.intlist mul.Scalar mul.Tensor mv.default
narrow.default native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default new_full.default
new_ones.default new_zeros.default norm.ScalarOpt_dim norm.Scalar numpy_T.default
one_hot.default ones.default ones_like.default outer.default pad.default permute.default pixel_shuffle.default
pixel_unshuffle.default polar.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default prod.default
prod.dim_int real.default reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor
repeat.default repeat_interleave.self_int reshape.default rms_norm.default roll.default round.default rsqrt.default
rsub.Scalar rsub.Tensor scalar_tensor.default scaled_dot_product_attention.default scatter.src scatter.value
scatter_add.default scatter_reduce.two searchsorted.Tensor select.int select_scatter.default selu.default
sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor slice_scatter.default softmax.int
softplus.default sort.default sort.stable split.Tensor split.sizes split_with_sizes.default sqrt.default
square.default squeeze.default squeeze.dim squeeze.dims stack.default std.correction std.dim stft.default
stft.center sub.Scalar sub.Tensor sum.default sum.dim_IntList swapaxes.default sym_numel.default sym_size.int t.default
tan.default tanh.default tensor_split.indices tensordot.default threshold.default tile.default
to.device to.dtype to.dtype_layout to.other topk.default transpose.int tril.default triu.default true_divide.Tensor
type_as.default unbind.int unflatten.int unfold.default unsafe_chunk.default unsafe_split.Tensor unsqueeze.default
upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec
upsample_trilinear3d.vec absolute.default clip.default concatenate.default divide.Scalar divide.Tensor greater.Scalar
greater.Tensor greater_equal.Scalar less.Scalar less.Tensor less_equal.Scalar moveaxis.int multiply.Scalar
multiply.Tensor negative.default not_equal.Scalar special_erf.default special_expit.default subtract.Scalar
subtract.Tensor swapdims.default var.correction var.dim var_mean.correction view.default
view.dtype reshape_as.default view_as.default
view_as_complex.default view_as_real.default vstack.default where.self where.Scalar
where.ScalarOther where.ScalarSelf xlogy.Tensor zeros.default zeros_like.default
"""


class Signature:
    """Types of one function's arguments and results.

    Attributes:
        call: The function.
        arguments: Name → type as torch's schemas have it; positional ones in order.
        positional: How many of them may be given by position.
        results: One type, or a tuple of them where several come back.
        required: Names that have no default.
    """

    def __init__(self, call: Callable[..., Any], schema: torch.FunctionSchema) -> None:
        self.call = call
        self.arguments = {argument.name: argument.real_type for argument in schema.arguments}
        self.positional = sum(not argument.kwarg_only for argument in schema.arguments)
        self.required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
        results = [result.real_type for result in schema.returns]
        self.results = results[0] if len(results) == 1 else tuple(results)


WITHOUT_DROPOUT = frozenset(
    ("aten.scaled_dot_product_attention.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")
)
"""Random only in their dropout, which must be 0."""

KEPT_FALSE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "aten.batch_norm.default": {"training": ("running_mean", "running_var")},
    "aten.instance_norm.default": {"use_input_stats": ("running_mean", "running_var")},
}
"""Operators that write to arguments although their schema does not say so, unless one argument is false."""


# Torch's kernels for these read past the end of a tensor, or give back memory that nobody wrote, where arguments do not
# fit each other; seen with torch 2.13. In their place is called what looks first.


def _require(fits: bool, what: str, *given: Any) -> None:
    if not fits:
        found = (list(value.shape) if isinstance(value, torch.Tensor) else value for value in given)
        raise ValueError(f"{what} that do not fit: {', '.join(map(str, found))}")


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> Any:
    fits = dim not in (0, v.dim() - 1) or (v.numel() > 0 and g.numel() == v.shape[dim] and g.dtype == v.dtype)
    _require(fits, "weights, their norms and the dimension", v, g, dim)
    return torch.ops.aten._weight_norm.default(v, g, dim)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any) -> Any:
    _require(key.shape[-2:-1] == value.shape[-2:-1], "keys and values", key, value)
    return torch.ops.aten.scaled_dot_product_attention.default(query, key, value, *more, **named)


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **named: Any) -> Any:
    outer = query.dim() == 4 and query.shape[:2] == key.shape[:2]
    fits = outer and key.shape == value.shape and query.shape[-1:] == key.shape[-1:]
    _require(fits, "queries, keys and values", query, key, value)
    if (mask := named.get("attn_mask")) is not None:
        mask.expand(*query.shape[:3], key.shape[2])  # raises where it does not fit
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, *more, **named)


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *more: Any,
    **named: Any,
) -> Any:
    each = [tensor for tensor in (weight, bias, running_mean, running_var) if tensor is not None]
    fits = input.dim() > 1 and all(tensor.shape == input.shape[1:2] for tensor in each)
    _require(fits, "channels and their statistics", input, *each)
    overload = torch.ops.aten._native_batch_norm_legit_no_training.default
    return overload(input, weight, bias, running_mean, running_var, *more, **named)


def _grid_sampler(overload: Callable[..., Any]) -> Callable[..., Any]:
    def checked(
        input: torch.Tensor, grid: torch.Tensor, interpolation_mode: int, padding_mode: int, *more: Any, **named: Any
    ) -> Any:
        known = interpolation_mode in (0, 1, 2) and padding_mode in (0, 1, 2)
        _require(known, "modes of interpolation and padding", interpolation_mode, padding_mode)
        return overload(input, grid, interpolation_mode, padding_mode, *more, **named)

    return checked


_CHECKED: Mapping[str, Callable[..., Any]] = {
    "aten._weight_norm.default": _weight_norm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _flash_attention,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.grid_sampler.default": _grid_sampler(torch.ops.aten.grid_sampler.default),
    "aten.grid_sampler_2d.default": _grid_sampler(torch.ops.aten.grid_sampler_2d.default),
}

_NAMES = frozenset(_ATEN.split())
_PREFIX = "aten."


def allowed(name: object) -> bool:
    """Whether a graph may call a function of that name."""
    return isinstance(name, str) and (name in SIZES or (name.startswith(_PREFIX) and name[len(_PREFIX) :] in _NAMES))


@cache
def signature_of(name: str) -> Signature | None:
    """Of an operator on tensors that is allowed; None where this torch has none of that name, or it is not pure."""
    if not allowed(name) or name in SIZES:
        return None
    packet, _, overload_name = name[len(_PREFIX) :].partition(".")
    overload = getattr(getattr(torch.ops.aten, packet, None), overload_name, None)
    if overload is None or overload._schema.is_mutable:
        return None
    if torch.Tag.nondeterministic_seeded in overload.tags and name not in WITHOUT_DROPOUT:
        return None
    return Signature(_CHECKED.get(name, overload), overload._schema)
