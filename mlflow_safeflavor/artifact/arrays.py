"""Numpy arrays: of torch's tensors, without importing torch, and in files."""

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
    """Whether a value is a tensor of torch; where nobody imported that, it is none."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU and without gradients, in the same memory where it can be.

    Halves become float32, which holds each of their numbers: numpy knows no bfloat16.
    """
    there = tensor.detach().cpu()
    known = not there.is_floating_point() or there.element_size() >= 4
    array: np.ndarray = (there if known else there.float()).numpy(force=True)
    return array


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write named arrays, as golden rows have them, as one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(arrays), path)


def read_arrays(content: bytes, where: str) -> dict[str, np.ndarray]:
    """Read what ``write_arrays`` wrote.

    Args:
        content: Of the file.
        where: What messages call it.

    Raises:
        IntegrityError: It is not readable.
    """
    with reading(where):
        return dict(load(content))


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raises ``IntegrityError`` naming ``where`` for what the safetensors library refuses."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            "A safetensors file cannot be read", where=where, found=error, hint=FETCH_AGAIN
        ) from None
