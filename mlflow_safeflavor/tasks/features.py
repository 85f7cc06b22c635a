"""What a model is asked and what it says, one mapping a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Features", "RowOutput"]

Features = Mapping[str, Any]
"""One encoded row, or a piece of one, unpadded: model argument → list of int (or array)."""

RowOutput = Mapping[str, np.ndarray]
"""What the model said of one row or piece, in float32 at least, without padding.

Output name → array; for parity.
"""
