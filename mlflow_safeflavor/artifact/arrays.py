"""Numpy arrays: of torch's tensors, without importing torch, and in safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

__all__ = ["array_of", "is_tensor", "read_arrays", "reading", "write_arrays"]


def is_tensor(value: Any) -> TypeIs[torch.Tensor]:
    """Whether a value is a tensor of torch; False where torch was not imported."""
    # No tensor exists before torch was imported: so nothing here has to import it.
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array on the CPU, in the same memory where it can be; halves as float32."""
    there = tensor.detach().cpu()
    # numpy has no bfloat16, and converts no float8; float32 holds each of their numbers.
    known = not there.is_floating_point() or there.element_size() >= 4
    # force: lazily conjugated and negated views are made real, which plain numpy() refuses.
    array: np.ndarray = (there if known else there.float()).numpy(force=True)
    return array


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write named arrays, as golden rows have them, as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(arrays), path)


def read_arrays(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Read a file of ``write_arrays``.

    Args:
        content: Bytes of the file.
        where: Its name in messages.

    Raises:
        IntegrityError: It is not readable.
    """
    with reading(where):
        return dict(load(content))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise ``IntegrityError`` naming ``where`` for any refusal of the safetensors library."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            "A safetensors file cannot be read", where=where, found=error, hint=FETCH_AGAIN
        ) from None
