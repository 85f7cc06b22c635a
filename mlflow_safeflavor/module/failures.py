"""Failures of a forward: whether memory ran out, and the error that callers get."""

from __future__ import annotations

import sys
from typing import Any

from mlflow_safeflavor.errors import AnswerError, OverloadedError, SafeFlavorError

__all__ = ["is_out_of_memory", "named_failure"]

# Texts of the errors of cuBLAS and cuDNN, of the driver, of torch's allocator for the CPU, and of
# ONNX Runtime's arena: none has a class of its own.
_NO_ROOM = (
    "STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: ",
    "BFCArena::Allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, had no room for what a forward needed: fewer rows may fit."""
    torch: Any = sys.modules.get("torch")  # a process without it has none of its errors
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.cuda.OutOfMemoryError)
    # ONNX Runtime's errors are no RuntimeErrors.
    return isinstance(error, kinds) or (
        isinstance(error, Exception) and any(word in str(error) for word in _NO_ROOM)
    )


def named_failure(error: BaseException, where: str = "forward") -> SafeFlavorError:
    """An error of this package for an exception of a forward; its own errors stay as they are."""
    # SystemExit, too: raised again in a caller's thread it would end the server.
    if isinstance(error, SafeFlavorError):
        return error
    if is_out_of_memory(error):
        # Not as the cause: its frames would hold what the forward had made, for as long as the
        # error is looked at.
        return OverloadedError(
            "Memory ran out, and there is nothing smaller to try",
            where=where,
            found=error,
            hint="ask with fewer or shorter rows, or for fewer tokens, or later, when what else is "
            "on the device needs less; or serve the model on one with more memory",
        )
    named = AnswerError(
        "The model failed over the rows it was asked",
        where=where,
        found=f"{type(error).__name__}: {error}",
        hint="ask with fewer or other rows; the cause is chained to this error, and in the log of "
        "the server",
    )
    named.__cause__ = error
    return named
