"""Features of a row, and raw outputs of a row: one mapping each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Features", "RowOutput"]

# One encoded row, or a piece of one, unpadded: model argument → list of int (or array).
Features = Mapping[str, Any]

# Output name → array of one row or piece, in float32 at least, without padding; compared in parity.
RowOutput = Mapping[str, np.ndarray]
