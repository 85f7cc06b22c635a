"""Differences of arrays and values from what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["differences_of", "differing_arrays", "differing_values"]


def differing_arrays(
    index: int,
    part: str,
    found: Mapping[str, Any],
    wanted: Mapping[str, np.ndarray],
    atol: float,
    rtol: float,
) -> Iterator[str]:
    """Differences in the arrays of a row, in words; missing and new ones, too."""
    for name in sorted(wanted.keys() | found.keys()):
        where = f"row {index}, {part} {name}"
        if name not in wanted or name not in found:
            yield f"{where}: {'is new' if name in found else 'is gone'}"
            continue
        old, new = wanted[name], np.asarray(found[name])
        if old.shape != new.shape:
            yield f"{where}: shape {list(new.shape)}, recorded {list(old.shape)}"
        elif not np.allclose(new, old, atol=atol, rtol=rtol, equal_nan=True):
            yield f"{where}: differs by up to {_max_difference(old, new):.3g}"


def _max_difference(old: np.ndarray | None, new: np.ndarray) -> float:
    return float(differences_of(old, new).max(initial=0.0))


def differences_of(old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Absolute differences, flat; a single ``inf`` for another shape."""
    if old is None or old.shape != new.shape:
        return np.full(1, np.inf)
    # In float64, since whole numbers wrap (uint8: 0 - 1 = 255) and halves overflow. inf - inf is
    # NaN, of which numpy warns; it counts as equal or as inf below.
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64))
    same = np.isclose(new, old, atol=0, rtol=0, equal_nan=True)  # infinities and NaNs that agree
    worst: np.ndarray = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    return np.ravel(worst)


def differing_values(
    where: str, wanted: Any, found: Any, atol: float, rtol: float
) -> Iterator[str]:
    """Differences in an answer, in words; floating point numbers may differ by the tolerance."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from differing_values(f"{where}, {key}", wanted[key], found[key], atol, rtol)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (old, new) in enumerate(zip(wanted, found, strict=True)):
            yield from differing_values(f"{where}[{index}]", old, new, atol, rtol)
    elif isinstance(wanted, float) and isinstance(found, float):
        if not np.isclose(found, wanted, atol=atol, rtol=rtol, equal_nan=True):
            yield f"{where}: {found!r}, recorded {wanted!r}"
    elif wanted != found:
        yield f"{where}: {found!r}, recorded {wanted!r}"
