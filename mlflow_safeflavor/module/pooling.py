"""Pooling of a text's tokens to one vector, as in sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlflow_safeflavor.errors import StructureError

__all__ = ["POOLINGS", "pool"]

# The mean of the tokens, the first, the last one, the largest of each number, the sum over the
# square root of their count, and the mean that weighs the token in the first place once, in the
# second twice, and so on.
POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean")

_LEAST = 1e-9


def pool(hidden: np.ndarray, mask: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """One vector, of one kind or of several side by side.

    Args:
        hidden: Hidden states of one text, shape (longest, size).
        mask: Tokens that count, bool of shape (longest,).
        kinds: Names in ``POOLINGS``; for "weightedmean" texts start on the left.

    Returns:
        Shape (size times kinds), in the dtype of ``hidden``.

    Raises:
        StructureError: There is no such kind.
    """
    # (tokens, size). Cut out, not multiplied by zero: padding may hold NaN. Then a text's bits
    # cannot depend on its padding, either.
    kept, places = hidden[mask], np.flatnonzero(mask)
    found: list[np.ndarray] = []
    for kind in kinds:
        if kind == "mean":
            found.append(_sum(kept) / max(len(kept), _LEAST))
        elif kind == "mean_sqrt_len":
            found.append(_sum(kept) / np.sqrt(max(len(kept), _LEAST)))
        elif kind == "weightedmean":
            weights = (places + 1).astype(hidden.dtype)
            found.append(_sum(kept * weights[:, None]) / max(weights.sum(), _LEAST))
        elif kind == "max":
            found.append(kept.max(axis=0, initial=-np.inf))
        elif kind not in POOLINGS:
            raise StructureError("Unknown pooling", where=kind, wanted=" | ".join(POOLINGS))
        else:  # of a text without tokens its first position
            place = 0 if not len(places) else places[0] if kind == "cls" else places[-1]
            found.append(hidden[place])
    vector: np.ndarray = np.concatenate(found).astype(hidden.dtype, copy=False)
    return vector


def _sum(vectors: np.ndarray) -> np.ndarray:
    """The sum over tokens, in float64."""
    # numpy adds rows one after the other: hundreds of float32 would lose a digit that torch keeps.
    total: np.ndarray = vectors.sum(axis=0, dtype=np.float64)
    return total
