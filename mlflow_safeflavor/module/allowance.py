"""Allowance: the memory that a constructor may ask for.

Its arguments are numbers of a file, and products of them: a few calls can ask for more than any
machine has. Torch allocates at once, and the system may kill a process that then writes to it. So
while a module is constructed, the size of each operator's result is bounded before it is called.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlflow_safeflavor.module.bounds import sheltered

__all__ = ["Allowance", "TooMuch"]

# Bytes of a complex128: no element is wider, so that count times this is never too low a bound.
_WIDEST = 16


class TooMuch(Exception):
    """The memory that an operator wants, in words."""


class Allowance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls operators while all that they made is within a number of bytes.

    Memory that an operator uses inside and frees again is not seen.

    Args:
        most_bytes: The allowance.

    Raises:
        TooMuch: Before the call that is beyond it.
    """

    def __init__(self, most_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = most_bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, only to keep that out of this mode.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Composed operators are bounded call by call.
        result = self.call(func.decompose, *args, **kwargs)
        if result is not NotImplemented:
            return result
        # A bound from the arguments costs microseconds. Only where it is beyond the allowance does
        # torch compute the size without memory, which imports its compiler.
        if _WIDEST * _most_values(func, args, kwargs) > self.left:
            self._require(_exact_bytes(func, args, kwargs))
        result = func(*args, **kwargs)
        # A result in the memory of an argument (a view, an operator in place) takes none.
        known = {_storage(tensor) for tensor in _tensors((args, tuple(kwargs.values())))}
        for tensor in _tensors(result):
            if _storage(tensor) not in known and not tensor.is_meta:
                self._hold(tensor)
        return result

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function within the allowance."""
        # Not by ``with``: interrupted in its __exit__ (see ``bounds``), torch would go on to ask
        # this mode about everything that this thread does.
        thread, entered = threading.get_ident(), False
        try:
            sheltered.add(thread)
            self.__enter__()  # type: ignore[no-untyped-call]
            entered = True
            sheltered.discard(thread)
            return function(*args, **kwargs)
        finally:
            try:
                sheltered.add(thread)
            finally:  # also where the interruption comes just before the line above
                try:
                    if entered:
                        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                finally:
                    sheltered.discard(thread)

    def _require(self, nbytes: int) -> None:
        if nbytes > self.left:
            raise TooMuch(
                f"wants {nbytes:,} bytes, and {max(0, self.left):,} are left of what may be held"
            )

    def _hold(self, tensor: torch.Tensor) -> None:
        nbytes = tensor.untyped_storage().nbytes()
        self._require(nbytes)
        self.left -= nbytes  # never given back: a parameter may hold the memory of a freed tensor


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _exact_bytes(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Bytes of an operator's result, as torch computes them on the meta device."""

    def empty(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        if isinstance(value, (list, tuple)):
            return [empty(item) for item in value]
        return torch.device("meta") if isinstance(value, torch.device) else value

    arguments = {name: empty(value) for name, value in kwargs.items()}
    if any(argument.name == "device" for argument in func._schema.arguments):
        arguments["device"] = torch.device("meta")
    try:
        result = func(*empty(args), **arguments)
    except (NotImplementedError, RuntimeError):
        return 0  # the size depends on values (nonzero): the result is counted after the call
    return sum(
        tensor.untyped_storage().nbytes() for tensor in _tensors(result) if not _is_view(func)
    )


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


# --- a bound from the arguments ------------------------------------------------------------------


def _most_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """At least as many values as the result has."""
    if _is_view(func):
        return 0
    given = (*args, *kwargs.values())
    rule = _RULES.get(func._schema.name.removeprefix("aten::"))
    return _of_broadcast(given) if rule is None else rule(given)


def _of_broadcast(given: Sequence[Any]) -> int:
    """Elements of all operands broadcast together: a bound of products, reductions and maps."""
    sizes: list[int] = []
    for tensor in _tensors(given):
        shape = tensor.shape[::-1]
        sizes += [1] * (len(shape) - len(sizes))
        for i, size in enumerate(shape):
            sizes[i] = max(sizes[i], size)
    return int(math.prod(sizes))


def _of_numbers(given: Sequence[Any]) -> int:
    """The product of all sizes and numbers given, any of which may be a factor."""
    return max(1, _of_broadcast(given)) * math.prod(
        math.ceil(abs(number)) + 1 for number in _numbers(given)
    )


def _of_square(given: Sequence[Any]) -> int:
    return _of_numbers(given) ** 2


def _of_range(given: Sequence[Any]) -> int:
    first, *more = [number for number in given if type(number) in (int, float)]
    start, end, step = (
        (0, first, 1) if not more else (first, more[0], more[1] if len(more) > 1 else 1)
    )
    return math.ceil(abs((end - start) / step)) + 1 if step else 0


def _of_all(given: Sequence[Any]) -> int:
    return math.prod(max(1, tensor.numel()) for tensor in _tensors(given))


def _of_sum(given: Sequence[Any]) -> int:
    return sum(tensor.numel() for tensor in _tensors(given))


def _of_index(given: Sequence[Any]) -> int:
    """Elements of a lookup: as many rows as there are indices."""
    tensor, indices = given[0], given[1]
    # embedding(weight, indices), index_select(tensor, dim, indices)
    if not isinstance(indices, (list, tuple)):
        dim = indices if type(indices) is int else 0
        indices = [None] * (dim % max(1, tensor.dim())) + list(_tensors(given[1:]))
    picked = sum(isinstance(index, torch.Tensor) for index in indices)
    kept = [size for i, size in enumerate(tensor.shape) if i >= len(indices) or indices[i] is None]
    return int(max(1, _of_broadcast(indices)) * math.prod(kept) if picked else tensor.numel())


def _of_convolution(given: Sequence[Any]) -> int:
    inputs, weight = given[0], given[1]
    # convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding,
    # groups). Transposed ones grow with the stride; each size is bounded as if it were one.
    stride, padding, dilation, _, more, groups = given[3:9]
    count = inputs.shape[0] * max(weight.shape[0], weight.shape[1] * groups)
    for i, size in enumerate(inputs.shape[2:]):
        at = [values[min(i, len(values) - 1)] for values in (stride, padding, dilation, more)]
        count *= (
            size * max(1, at[0]) + 2 * abs(at[1]) + at[2] * weight.shape[2 + i] + abs(at[3]) + 1
        )
    return int(count)


def _numbers(value: Any) -> Iterator[float]:
    if type(value) in (int, float) and math.isfinite(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)


def _named(
    rule: Callable[[Sequence[Any]], int], names: str
) -> dict[str, Callable[[Sequence[Any]], int]]:
    return dict.fromkeys(names.split(), rule)


# Operators whose results can be larger than a broadcast of their arguments.
_RULES: Mapping[str, Callable[[Sequence[Any]], int]] = {
    **_named(
        _of_numbers,
        "zeros ones full empty empty_strided new_zeros new_ones new_full new_empty "
        "new_empty_strided linspace logspace hann_window repeat repeat_interleave constant_pad_nd "
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d _pad_circular im2col upsample_nearest1d upsample_nearest2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _adaptive_avg_pool2d _adaptive_avg_pool3d "
        "adaptive_max_pool2d avg_pool2d max_pool2d_with_indices unfold_copy one_hot stft _fft_r2c "
        "_fft_c2r _fft_c2c pixel_unshuffle",
    ),
    **_named(_of_square, "eye diag_embed diag"),
    **_named(_of_range, "arange"),
    **_named(_of_sum, "cat stack"),
    **_named(_of_index, "embedding index index_select"),
    **_named(_of_all, "grid_sampler_2d grid_sampler_3d searchsorted bucketize cross tensordot"),
    "convolution": _of_convolution,
}
