"""Embeddings in fewer bits, as ``quantize_embeddings`` of sentence-transformers makes them."""

from __future__ import annotations

import numpy as np

__all__ = ["PRECISIONS", "SCALED", "quantized"]

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
# Those that divide the range of each number into 256 steps.
SCALED = ("int8", "uint8")


def quantized(vector: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """A vector in a precision.

    Args:
        vector: Shape (size,).
        precision: One of ``PRECISIONS``. "float32" leaves a vector as it is; "ubinary" packs the
            signs of eight numbers into one, the first into the highest bit; "int8" and "binary" are
            "uint8" and "ubinary" minus 128.
        ranges: Lowest and highest value of each number, shape (2, size), for ``SCALED``. What lies
            outside becomes the nearest end.

    Returns:
        Shape (size,); of "binary" and "ubinary" (size / 8,), rounded up.
    """
    if precision == "float32":
        return vector
    if precision in SCALED:
        assert ranges is not None  # noqa: S101  (for mypy; params without ranges do not allow it)
        low, high = ranges
        steps = (high - low) / 255
        # A number that was the same in all calibration texts would divide by 0.
        steps = np.where(steps == 0, 1, steps)
        levels = np.clip(np.floor((vector - low) / steps), 0, 255).astype(np.uint8)
    else:
        levels = np.packbits(vector > 0)  # eight to a byte, filled up with zeros
    # In int16: 0 - 128 wraps in uint8.
    whole: np.ndarray = levels if precision.startswith("u") else levels.astype(np.int16) - 128
    return whole
