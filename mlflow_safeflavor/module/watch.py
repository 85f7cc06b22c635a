"""Watch of a constructor: other threads' dtypes, and memory that it never wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mlflow_safeflavor.module.memory import asks_for_dtype

__all__ = ["FIRST_MARK", "SECOND_MARK", "Watch"]

# Values written into memory before a constructor gets it.
FIRST_MARK, SECOND_MARK = 3, 5


class Watch(TorchFunctionMode):
    """Marks memory that a constructor gets; sees other threads change torch's default dtype.

    A tensor that differs between two constructions with different marks holds memory that was never
    written.

    Args:
        dtype: Torch's default dtype during construction.
        mark: Written into memory before a constructor gets it; None for no marks.

    Attributes:
        disturbed: Whether the default dtype was another one at some point.
    """

    _ALLOCATORS = frozenset(
        ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )
    _FACTORIES = frozenset(
        ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros")
    )

    def __init__(self, dtype: torch.dtype, mark: int | None = None) -> None:
        super().__init__()
        self.dtype, self.mark, self.disturbed = dtype, mark, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = torch.get_default_dtype()
        result = func(*args, **kwargs)
        self.disturbed |= before != self.dtype or torch.get_default_dtype() != self.dtype
        name = getattr(func, "__name__", None)
        # Torch has one default dtype for all threads; another may swap it and back while func runs.
        if name in self._FACTORIES and not asks_for_dtype(args, kwargs):
            self.disturbed |= result.is_floating_point() and result.dtype != self.dtype
        if self.mark is not None and name in self._ALLOCATORS and isinstance(result, torch.Tensor):
            _write_marks(result, self.mark)
        return result


def _write_marks(tensor: torch.Tensor, mark: int) -> None:
    if tensor.is_meta or not tensor.numel() or not tensor.is_contiguous():
        return
    flat = tensor.detach().view(-1)
    value = mark != FIRST_MARK if tensor.dtype == torch.bool else mark
    # Some 4,096 places and the last, of a large tensor one in 64 kB: each touches a page, which is
    # memory only from then on, and two of a large model may not fit beside it.
    places = 4096 if tensor.nbytes < 1 << 23 else max(512, tensor.nbytes >> 16)
    flat[:: max(1, flat.numel() // places)] = value
    flat[-1] = value
