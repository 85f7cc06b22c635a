"""What a model returned: the output that a task reads, whether it is numbers at all, and logits → scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.rows import place

__all__ = ["own", "own_array", "pick", "require_finite", "sigmoid", "softmax", "wide"]


def pick(
    outputs: Mapping[str, torch.Tensor], name: str, shape: Sequence[int | None], position: int = 0
) -> torch.Tensor:
    """An output of the model in float32 at least, by its name, or by its position where the model names none.

    Args:
        outputs: What the engine returned.
        name: As transformers calls it.
        shape: Wanted lengths; None where any will do.
        position: Its place in a tuple.

    Raises:
        StructureError: There is none, or it has another shape.
    """
    tensor = outputs.get(name, outputs.get(f"output_{position}"))
    found = None if tensor is None else tuple(tensor.shape)
    if found is None or len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found, strict=True)):
        raise StructureError(
            f"The model does not return what its task reads: {name}",
            where="output of forward",
            wanted=f"{name}, shape ({', '.join('any' if length is None else str(length) for length in shape)})",
            found=", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items()) or "no tensor",
            way_out="choose the task this model was made for: task=...",
        )
    assert tensor is not None  # noqa: S101  (for mypy; found says so)
    return wide(tensor)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, which halves become because numpy knows none; or in float64, where the model answers in that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def own_array(tensor: torch.Tensor) -> np.ndarray:
    """An output as an array that shares no memory with anything: a forward may return a weight, or its input, as it is.

    Numpy knows no halves: these become float32.
    """
    known = not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.float64)
    dtype = tensor.dtype if known else torch.float32
    array: np.ndarray = tensor.detach().to("cpu", dtype, copy=True).numpy()
    return array


def own(value: Any) -> Any:
    """An answer that shares no memory with anything: arrays, tensors, lists and dicts, at any depth, are copied."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: own(item) for name, item in value.items()}
    return type(value)(map(own, value)) if type(value) in (list, tuple, set) else value


def require_finite(values: Sequence[np.ndarray] | np.ndarray, first: int = 0) -> None:
    """Refuse answers that are no numbers, which half precision overflow or broken weights make.

    Args:
        values: One array a row, of any shape.
        first: Number of the first row.

    Raises:
        InputError: Names the first such row.
    """
    bad = [i for i, value in enumerate(values) if not np.isfinite(value).all()]
    if bad:
        raise InputError(
            "The model's answer to a row is not a number",
            where=place(first + bad[0]),
            wanted="finite numbers",
            found=f"NaN or infinity in {len(bad)} of {len(values)} rows",
            way_out="ask without that row; half precision overflows where float32 does not: save the model with "
            "dtype='float32'",
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Scores that add up to 1 along the last axis; any shape, the dtype stays."""
    shifted: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """A score for each logit by itself; any shape, the dtype stays."""
    # Two branches of the same function: exp of a large positive number would overflow.
    small = np.exp(-np.abs(logits))
    scores: np.ndarray = np.where(logits >= 0, 1, small) / (1 + small)
    return scores
