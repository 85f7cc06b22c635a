"""Names of cells, columns and values in messages; rows are counted from 0."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

__all__ = ["format_cell", "format_value", "is_missing", "named_in_words"]


def format_cell(row: int, *columns: str | None) -> str:
    """A cell: ``row 3, column 'text'``, ``row 3, columns 'a' and 'b'``, or ``row 3``."""
    named = [column for column in columns if column is not None]
    return f"row {row}, {named_in_words(named)}" if named else f"row {row}"


def format_value(value: Any) -> str:
    """Type and shortened value, for ``found``."""
    if is_missing(value):
        return f"a missing value ({value!r})"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or NA."""
    # pd.isna would answer for each element of a list; these are all the scalars it knows.
    return (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, float) and value != value)
    )


def named_in_words(names: Sequence[Any]) -> str:
    """Columns by name: ``column 'a'``, ``columns 'a' and 'b'``."""
    if list(names) == [None]:
        return "one column"  # of a model whose column has no name
    return f"column{'s' if len(names) > 1 else ''} {' and '.join(map(repr, names))}"
