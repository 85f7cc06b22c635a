"""Answers against answers, value by value: JSON, and named arrays."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_safeflavor.predict.parity import Replayed, replayed_row

__all__ = ["Compared", "compare_answers", "compared", "compared_arrays"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def compare_answers(
    wanted: Sequence[Any],
    found: Sequence[Any],
    atol: float,
    rtol: float,
    *,
    golden: bool,
    start: int = 0,
) -> list[Replayed]:
    """Compare answers value by value.

    Args:
        wanted: Recorded answers, or those of the model loaded here; JSON.
        found: The server's, one each; JSON.
        atol: Absolute tolerance of floating point numbers. Whole numbers, truth values and texts
            must be equal.
        rtol: Relative tolerance.
        golden: Whether the rows were recorded with the model; otherwise they are the user's.
        start: Index of the first row.
    """
    name, source = ("row", "recorded") if golden else ("your row", "here")
    rows = []
    for index, (old, new) in enumerate(zip(wanted, found, strict=True), start):
        values = list(compared(f"{name} {index}", old, new, atol, rtol, source))
        problem = next((value.words for value in values if not value.tolerated), None)
        first = next((value.words for value in values if not value.identical), None)
        identical = all(value.identical for value in values)
        differences = [value.differences for value in values]
        rows.append(
            replayed_row(index, differences, problem, first, identical=identical, golden=golden)
        )
    return rows


@dataclass(frozen=True)
class Compared:
    """One value of an answer, or one array.

    Attributes:
        differences: Absolute differences, flat, float64; a single ``inf`` for another shape.
        identical: Whether all of it is the same bit for bit.
        tolerated: Whether all of it is within tolerance.
        words: The worst of it.
    """

    differences: np.ndarray
    identical: bool
    tolerated: bool
    words: str


def compared_arrays(
    where: str,
    wanted: Mapping[str, np.ndarray],
    found: Mapping[str, Any],
    atol: float,
    rtol: float,
) -> Iterator[Compared]:
    """Compare features or raw outputs of a row with recorded ones, by name."""
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found:
            words = f"{where} {name}: {'is new' if name in found else 'is gone'}"
            yield Compared(np.full(1, np.inf), False, False, words)
            continue
        old, new = _real(wanted[name]), _real(np.asarray(found[name]))
        if old.shape == new.shape:
            yield _compared_numbers(f"{where} {name}", old, new, atol, rtol, "recorded")
        else:
            words = f"{where} {name}: shape {list(new.shape)}, recorded {list(old.shape)}"
            yield Compared(np.full(1, np.inf), False, False, words)


def _real(array: np.ndarray) -> np.ndarray:
    """The array, of complex numbers as pairs."""
    return np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array


def compared(
    where: str, wanted: Any, found: Any, atol: float, rtol: float, source: str = "recorded"
) -> Iterator[Compared]:
    """Compare JSON values; see ``compare_answers``."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from compared(f"{where}, {key}", wanted[key], found[key], atol, rtol, source)
        return
    old, new = _numbers(wanted), _numbers(found)
    if old is not None and new is not None and old.shape == new.shape:
        yield _compared_numbers(where, old, new, atol, rtol, source)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, pair in enumerate(zip(wanted, found, strict=True)):
            yield from compared(f"{where}[{index}]", *pair, atol, rtol, source)
    else:
        # True == 1 in Python, and they are not the same answer.
        same = type(wanted) is type(found) and wanted == found
        words = f"{where}: {_SHORT.repr(found)}, {source} {_SHORT.repr(wanted)}"
        yield Compared(np.array([0.0 if same else np.inf]), same, same, words)


def _numbers(value: Any) -> np.ndarray | None:
    """A number or regular lists of them; None for anything else."""
    if value is None:
        return np.full((), np.nan)  # pandas writes NaN as JSON's null
    # A bool is an int in Python, and numpy would make 1 of it.
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return None
    try:
        array: np.ndarray = np.asarray(value)
    except (ValueError, OverflowError):  # ragged
        return None
    # Texts, truth values and mixtures are compared one by one, so that a message names the one.
    if array.dtype.kind not in "iuf" or not array.size:
        return None
    return array


def _compared_numbers(
    where: str, old: np.ndarray, new: np.ndarray, atol: float, rtol: float, source: str
) -> Compared:
    whole = old.dtype.kind in "iub" and new.dtype.kind in "iub"
    equal = (old == new) | (np.isnan(old) & np.isnan(new))
    # Equal numbers can still be different bits: 0.0 and -0.0. The sign of a NaN says nothing.
    same = equal if whole else equal & ((np.signbit(old) == np.signbit(new)) | np.isnan(old))
    near = equal if whole else np.isclose(new, old, atol=atol, rtol=rtol, equal_nan=True)
    worst = np.argwhere(~near) if not near.all() else np.argwhere(~same)
    words = ""
    if len(worst):
        place = tuple(worst[0])
        index = "".join(f"[{i}]" for i in place)
        words = f"{where}{index}: {new[place].item()!r}, {source} {old[place].item()!r}"
    return Compared(_differences(old, new), bool(same.all()), bool(near.all()), words)


def _differences(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    # In float64, since whole numbers wrap (uint8: 0 - 1 = 255) and halves overflow. inf - inf is
    # NaN, of which numpy warns; it counts as equal or as inf below.
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64))
    same = np.isclose(new, old, atol=0, rtol=0, equal_nan=True)  # infinities and NaNs that agree
    worst: np.ndarray = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    return np.ravel(worst)
