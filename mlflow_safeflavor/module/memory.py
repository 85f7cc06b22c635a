"""Real memory for constructors: one at a time, and nothing initialised that will be replaced."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.allowance import Allowance, TooMuch
from mlflow_safeflavor.module.random_state import kept_random_state

__all__ = ["asks_for_dtype", "real_memory"]

_build_lock = threading.RLock()


class _Constructing(TorchFunctionMode):
    """Torch's functions while a constructor runs, all of whose tensors stored ones will replace.

    Random initialisers leave their tensor untouched. Asking for far more memory, or far more
    tensors and modules, than were stored is refused: a config may say any sizes and layers.
    """

    # One mode, because each costs some microseconds for each of thousands of calls. Modes belong to
    # a thread: other threads see nothing of it.

    _RANDOM = frozenset(
        (
            *("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_"),
            *("kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
        )
    )
    _ALLOCATORS = frozenset(("empty", "full", "ones", "rand", "randn", "zeros"))
    _READERS = frozenset(("__get__", "__set__", "to", "size", "dim", "numel", "is_floating_point"))

    def __init__(self, inventory: Inventory | None = None) -> None:
        super().__init__()
        # Generous: stored dtypes are narrower than float32, and constructors make tensors they do
        # not keep.
        most_bytes = 8 * inventory.nbytes + 2**30 if inventory else sys.maxsize
        self.allowance = Allowance(most_bytes)
        self.most_parts = 10 * len(inventory.rows) + 1000 if inventory else sys.maxsize
        self.bounded = inventory is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Functions of torch.nn.init and of transformers.initialization, and methods of tensors.
        if name in self._RANDOM and not _truncates():
            return args[0] if args else kwargs["tensor"]
        in_place = name.endswith("_") and not name.endswith("__")
        if not self.bounded or in_place or name in self._READERS:
            return func(*args, **kwargs)
        # Counted afterwards: memory costs nothing before it is written to. Everything else writes,
        # and is bounded before the call.
        if name == "empty":
            result = func(*args, **kwargs)
            self.allowance.left -= result.nbytes
            if self.allowance.left < 0:
                raise _too_much(f"a tensor of shape {list(result.shape)}")
        else:
            try:
                result = self.allowance.call(func, *args, **kwargs)
            except TooMuch as error:
                raise _too_much(f"{name} {error}") from None
        if name in self._ALLOCATORS:
            self.count()
        return result

    def count(self) -> None:
        """One more tensor or module."""
        self.most_parts -= 1
        if self.most_parts < 0:
            raise _too_much("more tensors and modules than ten times those that were stored")


def _too_much(found: str) -> StructureError:
    return StructureError(
        "The constructor wants far more memory than the stored tensors take",
        where="a config or constructor argument",
        found=found,
        hint=FETCH_AGAIN,
    )


class _DefaultDtype(TorchFunctionMode):
    """Torch's default dtype for tensors that this thread makes, beside another in the process.

    Code that asks for the default dtype still sees the other one; tensors that it then makes are
    replaced or compared.
    """

    # Torch has one for all threads. While another thread has changed it for a moment, as
    # transformers' loader does, setting it would spoil that thread's model, and putting it back
    # would keep that moment's value for good.

    _FACTORIES = frozenset(
        (
            *(
                "arange",
                "as_tensor",
                "empty",
                "eye",
                "full",
                "linspace",
                "logspace",
                "ones",
                "rand",
                "randn",
            ),
            *("scalar_tensor", "tensor", "zeros"),
        )
    )

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (
            getattr(func, "__name__", None) in self._FACTORIES
            and not asks_for_dtype(args, kwargs)
            and result.is_floating_point()
            and result.dtype == torch.get_default_dtype()
        ):
            return func(*args, **{**kwargs, "dtype": self.dtype})
        return result


def asks_for_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of a factory say which dtype it makes, so that torch's default does not."""
    return kwargs.get("dtype") is not None or any(isinstance(value, torch.Tensor) for value in args)


def _truncates() -> bool:
    """Whether ``trunc_normal_`` is drawing, the one initialiser that no mode sees itself."""
    # Since torch 2.13 it draws until every value is within bounds: with a skipped ``normal_``, on
    # memory that is never written, it would not end.
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):  # other modes may stand in between
        if frame is None or frame.f_code.co_name == "_no_grad_trunc_normal_":
            return frame is not None
        frame = frame.f_back
    return False


_constructing = threading.local()


def _mark_initialised(module: torch.nn.Module, name: str, child: torch.nn.Module | None) -> None:
    """Count a submodule, and tell transformers that its ``_init_weights`` need not run."""
    mode: _Constructing | None = getattr(_constructing, "mode", None)
    if child is not None and mode is not None:
        child.__dict__["_is_hf_initialized"] = True  # half the time of building
        mode.count()


# Once and for good: torch walks its dict of hooks without a lock, and taking one out again would
# break a construction in another thread.
register_module_module_registration_hook(_mark_initialised)


@contextmanager
def real_memory(
    dtype: torch.dtype = torch.float32,
    *,
    initialise: bool = False,
    inventory: Inventory | None = None,
) -> Iterator[None]:
    """Let constructors inside allocate on the CPU, within any device context or default.

    One at a time in the process; the random states are left as they were.

    Args:
        dtype: Torch's default dtype inside.
        initialise: Run random initialisers, too.
        inventory: Tensors that will replace all those made. It bounds what may be allocated,
            initialisers of any kind are skipped, and the default dtype of other threads is left
            alone.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_build_lock)  # torch's default dtype is the process's
        stack.enter_context(kept_random_state())
        # Which a constructor that is interrupted may leave as it was inside.
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        before = torch.get_default_dtype()
        if dtype != before and inventory is not None:
            stack.enter_context(_DefaultDtype(dtype))
        elif dtype != before:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        # Innermost: ``with torch.device("meta")`` around a load must reach no constructor.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if not initialise:
            mode = stack.enter_context(_Constructing(inventory))
            stack.callback(setattr, _constructing, "mode", getattr(_constructing, "mode", None))
            _constructing.mode = mode if inventory is not None else None
        yield
