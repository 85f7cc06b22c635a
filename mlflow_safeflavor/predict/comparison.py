"""Answers of a server against recorded ones, value by value; JSON on both sides."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_safeflavor.predict.differences import differences_of
from mlflow_safeflavor.predict.parity import Replayed, replayed_row

__all__ = ["compare_answers"]

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
        values = list(_compared(f"{name} {index}", old, new, atol, rtol, source))
        problem = next((value.words for value in values if not value.tolerated), None)
        first = next((value.words for value in values if not value.identical), None)
        identical = all(value.identical for value in values)
        differences = [value.differences for value in values]
        rows.append(
            replayed_row(index, differences, problem, first, identical=identical, golden=golden)
        )
    return rows


@dataclass(frozen=True)
class _Compared:
    """One value of an answer, or one list of numbers; ``words`` say the worst of it."""

    differences: np.ndarray
    identical: bool
    tolerated: bool
    words: str


def _compared(
    where: str, wanted: Any, found: Any, atol: float, rtol: float, source: str
) -> Iterator[_Compared]:
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from _compared(f"{where}, {key}", wanted[key], found[key], atol, rtol, source)
        return
    old, new = _numbers(wanted), _numbers(found)
    if old is not None and new is not None and old.shape == new.shape:
        yield _compared_numbers(where, old, new, atol, rtol, source)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, pair in enumerate(zip(wanted, found, strict=True)):
            yield from _compared(f"{where}[{index}]", *pair, atol, rtol, source)
    else:
        # True == 1 in Python, and they are not the same answer.
        same = type(wanted) is type(found) and wanted == found
        words = f"{where}: {_SHORT.repr(found)}, {source} {_SHORT.repr(wanted)}"
        yield _Compared(np.array([0.0 if same else np.inf]), same, same, words)


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
) -> _Compared:
    whole = old.dtype.kind in "iu" and new.dtype.kind in "iu"
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
    return _Compared(differences_of(old, new), bool(same.all()), bool(near.all()), words)
