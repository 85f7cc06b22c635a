"""Rows by column name, from any shape that users hold data in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.columns import require_columns
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value, named_in_words

__all__ = ["count_rows", "read_table", "unfold_columns"]

_ACCEPTED = "a DataFrame, Series, list, dict, numpy array or a single text"


def count_rows(data: Any) -> int:
    """Rows of any of the shapes that ``rows_of`` takes, before any is made; 1 for anything else."""
    # The longest column of a dict: whether they are equally long is told with the rows.
    if isinstance(data, Mapping):
        return max(
            (count_rows(value) for value in data.values() if not isinstance(value, Mapping)),
            default=1,
        )
    return (
        len(data)
        if isinstance(data, (pd.DataFrame, pd.Series, list, tuple)) or _is_array(data)
        else 1
    )


def unfold_columns(data: Any) -> Any:
    """Undo MLflow's conversion of ``{"text": ["a", "b"]}`` to a frame of one row of lists.

    Anything else is returned untouched.

    Args:
        data: From MLflow.
    """
    # MLflow's schema enforcement turns a dict of lists of texts into a frame of *one* row whose
    # cells are those lists; a dict of arrays, or with any value that is no text, becomes a frame of
    # as many rows as it should. Such a frame can also be a single bad row of lists of texts; as
    # both look alike here, it is taken for the dict, which people do write.
    if not isinstance(data, pd.DataFrame) or len(data) != 1:
        return data
    names, [cells] = _read(data)
    unfolded = bool(names) and len(set(names)) == len(names) and all(map(_is_texts, cells))
    return dict(zip(names, cells, strict=True)) if unfolded else data


def read_table(data: Any, names: list[Any], needed: list[Any]) -> list[Mapping[Any, Any]]:
    """Each row as a dict by column name. Raises ``InputError``."""
    if isinstance(data, pd.DataFrame):
        return _from_frame(data, names, needed)
    if isinstance(data, Mapping):
        return _from_dict(data, names, needed)
    if isinstance(data, pd.Series):
        return _from_values(data.tolist(), names, "Series")
    if isinstance(data, np.ndarray):
        return _from_array(data, names)
    if isinstance(data, (list, tuple)):
        return _from_list(data, names)
    if isinstance(data, str):
        return _from_values([data], names, "single text")
    raise InputError(
        "Rows cannot be read from this type",
        where=named_in_words(names),
        wanted=_ACCEPTED,
        found=format_value(data),
        hint=f"pass a DataFrame with {named_in_words(names)}",
    )


def _from_frame(
    frame: pd.DataFrame, names: list[Any], needed: list[Any]
) -> list[Mapping[Any, Any]]:
    there, rows = _read(frame)
    if len(set(there)) < len(there):
        twice = list(dict.fromkeys(name for i, name in enumerate(there) if name in there[:i]))
        raise InputError(
            "Columns have the same name", where=f"columns {twice}", wanted="unique column names"
        )
    require_columns(there, names, needed)
    return [dict(zip(there, row, strict=True)) for row in rows]


def _read(frame: pd.DataFrame) -> tuple[list[Any], list[list[Any]]]:
    """Names of columns, and the cells of each row."""
    # All at once takes pandas a fifth of the time of row by row.
    return frame.columns.tolist(), frame.to_numpy(dtype=object).tolist()


def _from_dict(
    data: Mapping[Any, Any], names: list[Any], needed: list[Any]
) -> list[Mapping[Any, Any]]:
    listed = [
        isinstance(value, (list, tuple, pd.Series)) or _is_array(value) for value in data.values()
    ]
    # Before lengths are compared: an extra column must not be told as one of another length.
    require_columns(list(data), names, needed)
    if not any(listed):
        return [data]  # a dict of single values is one row
    if not all(listed):
        raise InputError(
            "Some columns are lists and some are single values",
            where=named_in_words(list(data)),
            wanted="lists everywhere (many rows) or single values everywhere (one row)",
            found=", ".join(f"{name!r}: {type(value).__name__}" for name, value in data.items()),
        )
    values = {
        name: value.tolist() if hasattr(value, "tolist") else list(value)
        for name, value in data.items()
    }
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            "Columns have different lengths",
            where=f"row {min(lengths.values())}, {named_in_words(list(data))}",
            wanted="one value for each row in each column",
            found=", ".join(f"{name!r}: {length}" for name, length in lengths.items()),
        )
    return _zip_columns(values, next(iter(lengths.values())))


def _from_array(array: np.ndarray, names: list[Any]) -> list[Mapping[Any, Any]]:
    if array.ndim == 2:
        return _from_list([tuple(row) for row in array.tolist()], names)
    if array.ndim == 1:
        return _from_values(array.tolist(), names, "1-D array")
    if array.ndim == 0:  # np.asarray("text")
        return _from_values([array.item()], names, "single value")
    raise InputError(
        "An array has too many dimensions",
        where=named_in_words(names),
        wanted=f"shape (rows,) or (rows, {len(names)})",
        found=f"shape {array.shape}",
    )


def _from_list(data: Sequence[Any], names: list[Any]) -> list[Mapping[Any, Any]]:
    """Rows of a list, which are all of row 0's kind: dicts, sequences, or values."""
    first = data[0] if data else None
    if isinstance(first, Mapping):
        return [_same_shape(i, item, Mapping, "a dict", names) for i, item in enumerate(data)]
    # For a model of one column a nested list is a bad value. A tuple of one is a row all the same,
    # which is what a 2-D array and a database cursor give.
    if isinstance(first, tuple) or (isinstance(first, list) and len(names) > 1):
        rows = [
            _same_shape(i, item, (list, tuple), "a list of values", names)
            for i, item in enumerate(data)
        ]
        return [_from_sequence(i, row, names) for i, row in enumerate(rows)]
    return _from_values(data, names, "list")


def _same_shape(i: int, item: Any, kinds: Any, wanted: str, names: list[Any]) -> Any:
    if not isinstance(item, kinds):
        raise InputError(
            "Rows of a list have different shapes",
            where=format_cell(i, *names),
            wanted=f"{wanted}, as row 0 is",
            found=format_value(item),
        )
    return item


def _from_sequence(i: int, values: Sequence[Any], names: list[Any]) -> Mapping[Any, Any]:
    if len(values) != len(names):
        raise InputError(
            "A row has the wrong number of values",
            where=format_cell(i, *names),
            wanted=f"{len(names)}, in this order: {named_in_words(names)}",
            found=f"{len(values)}",
        )
    return dict(zip(names, values, strict=True))


def _from_values(values: Iterable[Any], names: list[Any], kind: str) -> list[Mapping[Any, Any]]:
    values = list(values)
    if len(names) > 1 and values:
        raise InputError(
            f"A {kind} of single values cannot fill several columns",
            where=format_cell(0, *names),
            wanted=f"a DataFrame, or dicts, with {named_in_words(names)}",
            found=f"one value a row, the first is {format_value(values[0])}",
        )
    return [{names[0]: value} for value in values]


def _zip_columns(values: Mapping[Any, list[Any]], count: int) -> list[Mapping[Any, Any]]:
    return [{name: column[i] for name, column in values.items()} for i in range(count)]


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)
