"""What a model is asked and what it says, one mapping a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Features", "RowOutput"]

# One encoded row, or a piece of one, unpadded: model argument → list of int (or array).
Features = Mapping[str, Any]

# What the model said of one row or piece, in float32 at least, without padding.
#
# Output name → array; for parity.
RowOutput = Mapping[str, np.ndarray]
