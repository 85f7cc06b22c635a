"""Outputs of a model: the one that a task reads, its numbers checked, and logits → scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_safeflavor.artifact.arrays import is_tensor
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.inputs.wording import format_cell

__all__ = ["normalized", "own", "pick", "require_finite", "sigmoid", "softmax"]


def pick(
    outputs: Mapping[str, np.ndarray], name: str, shape: Sequence[int | None], position: int = 0
) -> np.ndarray:
    """An output of the model, by its name, or by its position where the model names none.

    Args:
        outputs: Of the engine.
        name: As transformers calls it.
        shape: Wanted lengths; None for any.
        position: Its index in a tuple.

    Raises:
        StructureError: There is none, or it has another shape.
    """
    # A forward that returns a tensor or a tuple names nothing: see ``engine.named_tensors``.
    array = outputs.get(name, outputs.get(f"output_{position}"))
    found = None if array is None else array.shape
    if (
        found is None
        or len(found) != len(shape)
        or any(w not in (None, f) for w, f in zip(shape, found, strict=True))
    ):
        raise StructureError(
            f"The model does not return what its task reads: {name}",
            where="output of forward",
            wanted=f"{name}, shape "
            f"({', '.join('any' if length is None else str(length) for length in shape)})",
            found=", ".join(f"{key} {value.shape}" for key, value in outputs.items())
            or "no tensor",
            hint="choose the task this model was made for: task=...",
        )
    assert array is not None  # noqa: S101  (for mypy; found says so)
    return array


def own(value: Any) -> Any:
    """A copy of an answer, with its arrays, tensors, lists and dicts at any depth."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: own(item) for name, item in value.items()}
    # Exactly these types: a named tuple takes its items one by one.
    return type(value)(map(own, value)) if type(value) in (list, tuple, set) else value


def require_finite(values: Sequence[np.ndarray] | np.ndarray, first: int = 0) -> None:
    """Refuse NaN and infinities, which overflows of half precision or broken weights make.

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
            where=format_cell(first + bad[0]),
            wanted="finite numbers",
            found=f"NaN or infinity in {len(bad)} of {len(values)} rows",
            hint="ask without that row; half precision overflows where float32 does not: save the "
            "model with dtype='float32'",
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Scores that add up to 1 along the last axis; any shape, the dtype stays."""
    # Shifted, so that the largest exponent is 0: exp of 89 is infinite in float32.
    shifted: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """A score for each logit by itself; any shape, the dtype stays."""
    # 1 / (1 + exp(-x)) for x ≥ 0, else exp(x) / (1 + exp(x)): neither exponent is ever positive.
    small = np.exp(-np.abs(logits))
    scores: np.ndarray = np.where(logits >= 0, 1, small) / (1 + small)
    return scores


def normalized(vector: np.ndarray) -> np.ndarray:
    """A vector scaled to length 1; one of zeros stays as it is."""
    # As a matrix of one row: numpy's norm of a vector is a product by BLAS, whose last bits change
    # with the number of threads.
    scaled: np.ndarray = vector / np.linalg.norm(vector[None], axis=1).clip(1e-12)
    return scaled
