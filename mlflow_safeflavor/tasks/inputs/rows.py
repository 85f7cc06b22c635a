"""What users hand to ``predict``, turned into rows: order kept, nothing guessed, nothing silently dropped.

A message always names the row (counted from 0) and the column, what was wanted, what was found and the way out.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.caps import Caps

__all__ = [
    "Row",
    "count_rows",
    "place",
    "require_clean",
    "require_texts",
    "rows_of",
    "unfold_columns",
    "without_extra_columns",
]

Row = Mapping[str, Any]
"""One row of the user's, by *field* of the task (``text``), not by column name (``buggy_code``)."""

_ACCEPTED = "a DataFrame, Series, list, dict, numpy array or a single text"


def rows_of(
    data: Any, columns: Mapping[str, str | None], required: Collection[str] | None = None, *, missing: bool = False
) -> list[Row]:
    """Rows by field, in order, from any of the shapes users hold data in.

    ================================  ==========================================================
    DataFrame, dict of columns        one row an entry; all columns equally long
    dict of scalars                   one row
    list of dicts                     one row each
    list of lists or tuples           one row each, values in the order of ``columns``
    2-D array, shape (rows, fields)   the same
    list, Series or 1-D array         one row each; only for models of a single column
    a single value                    one row; only for models of a single column
    ================================  ==========================================================

    Args:
        data: One of the shapes above.
        columns: Field → column name, in the task's order. A sole column may have None for a name: whatever the one
            column of ``data`` is called, it is meant.
        required: Fields that every row must have; by default all of ``columns``. A field that is not
            required may be absent as a column, but where its column exists no value may be missing.
        missing: Take None, NaN and NA as values.

    Raises:
        InputError: The shape is none of the above; there are no rows; a column is missing, unknown or
            of another length; a value is None, NaN or NA, where these are none.
    """
    columns = _named(columns, data)
    needed = [columns[field] for field in columns if required is None or field in required]
    records = _records(data, list(columns.values()), needed)
    if not records:
        raise InputError(
            "There are no rows to predict", wanted="at least one row", found=f"an empty {type(data).__name__}"
        )
    return [_row(i, record, columns, needed, missing) for i, record in enumerate(records)]


def require_texts(rows: Sequence[Row], columns: Mapping[str, str | None]) -> None:
    """Refuse rows in which a field of ``columns`` is anything but a text.

    Raises:
        InputError: Names the first such row and column.
    """
    for i, row in enumerate(rows):
        for field, column in columns.items():
            value = row.get(field)
            if not isinstance(value, str):
                raise InputError(
                    "A value is not a text",
                    where=place(i, column),
                    wanted="a str (it may be empty)",
                    found=describe_value(value) if field in row else "no such column",
                    way_out="convert it first, for example data[column].astype(str); drop or fill missing values",
                )


def require_clean(value: Any, where: str, caps: Caps | None = None) -> None:
    """Refuse a cell or param with a text, at any depth, that cannot be encoded as UTF-8 or is too long.

    Args:
        value: Anything.
        where: Row and column, or param, for messages.
        caps: With the most characters that all its texts may have together; None where they are files.

    Raises:
        InputError: Names ``where``.
    """
    characters = 0
    for text in _texts_in(value):
        characters += len(text)
        if not (text.isascii() or _is_unicode(text)):
            raise InputError(
                "A text holds half of a surrogate pair, which nothing can read",
                where=where,
                wanted="a str that can be encoded as UTF-8",
                found=ascii(reprlib.repr(text)),
                way_out='clean it first, for example text.encode("utf-8", "replace").decode()',
            )
    if caps is not None:
        caps.require("max_characters", characters, "A text is too long", where=where, instead="cut or split it")


def _texts_in(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif isinstance(part, np.ndarray) and part.dtype.kind in "OU":
            waiting += part.ravel().tolist()


def count_rows(data: Any) -> int:
    """Rows of any of the shapes that ``rows_of`` takes, before any is made; 1 for anything else."""
    if isinstance(data, Mapping):
        return max((count_rows(value) for value in data.values() if not isinstance(value, Mapping)), default=1)
    return len(data) if isinstance(data, (pd.DataFrame, pd.Series, list, tuple)) or _is_array(data) else 1


def unfold_columns(data: Any) -> Any:
    """Undo what MLflow does to ``{"text": ["a", "b"]}`` before a pyfunc model sees it.

    MLflow's schema enforcement turns a dict of lists of texts into a frame of *one* row whose cells are those
    lists; a dict of arrays or with any value that is no text becomes a frame of as many rows as it should. Such a
    frame can also be a single bad row of lists of texts; as both look alike here, the dict, which people
    do write, is what is meant. Anything else is returned untouched.

    Args:
        data: What MLflow handed over.
    """
    if not isinstance(data, pd.DataFrame) or len(data) != 1:
        return data
    names, [cells] = _read(data)
    unfolded = bool(names) and len(set(names)) == len(names) and all(map(_is_texts, cells))
    return dict(zip(names, cells, strict=True)) if unfolded else data


def without_extra_columns(data: Any, known: Collection[str]) -> Any:
    """A table or its rows without the columns that nobody knows; anything else untouched.

    Args:
        data: What the user handed over.
        known: Columns of the model.
    """
    if isinstance(data, pd.DataFrame):
        return data[[name for name in data.columns if name in known]]
    if isinstance(data, Mapping):
        return {name: value for name, value in data.items() if name in known}
    if isinstance(data, list):
        return [without_extra_columns(row, known) if isinstance(row, Mapping) else row for row in data]
    return data


def place(row: int, *columns: str | None) -> str:
    """How messages name a cell: ``row 3, column 'text'``, ``row 3, columns 'a' and 'b'``, without names ``row 3``."""
    named = [column for column in columns if column is not None]
    return f"row {row}, {_listed(named)}" if named else f"row {row}"


def describe_value(value: Any) -> str:
    """Type and shortened value, for ``found``."""
    if _is_missing(value):
        return f"a missing value ({value!r})"
    return f"{type(value).__name__} {reprlib.repr(value)}"


# Shapes → records by column name.


def _named(columns: Mapping[str, str | None], data: Any) -> Mapping[str, Any]:
    """The columns; one without a name gets that of the only column of ``data``, where that has names."""
    table = data[0] if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping) else data
    if None not in columns.values() or not isinstance(table, (pd.DataFrame, Mapping)):
        return columns
    [field], there = columns, table.columns.tolist() if isinstance(table, pd.DataFrame) else list(table)
    if len(there) > 1:
        named = {field: str(there[0])}
        raise InputError(
            "There are several columns, and the model takes one",
            where=_listed(there),
            wanted="one column, whatever its name",
            found=f"{there}",
            way_out=f"select it first: data[[{there[0]!r}]], or log the model with input_columns={named}",
        )
    return {field: there[0]} if there else columns


def _records(data: Any, names: list[Any], needed: list[Any]) -> list[Mapping[Any, Any]]:
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
        where=_listed(names),
        wanted=_ACCEPTED,
        found=describe_value(data),
        way_out=f"pass a DataFrame with {_listed(names)}",
    )


def _from_frame(frame: pd.DataFrame, names: list[Any], needed: list[Any]) -> list[Mapping[Any, Any]]:
    there, rows = _read(frame)
    if len(set(there)) < len(there):
        twice = list(dict.fromkeys(name for i, name in enumerate(there) if name in there[:i]))
        raise InputError("Columns have the same name", where=f"columns {twice}", wanted="unique column names")
    _require_columns(there, names, needed)
    return [dict(zip(there, row, strict=True)) for row in rows]


def _read(frame: pd.DataFrame) -> tuple[list[Any], list[list[Any]]]:
    """Names of columns, and the cells of each row. All at once, which takes pandas a fifth of the time."""
    return frame.columns.tolist(), frame.to_numpy(dtype=object).tolist()


def _from_dict(data: Mapping[Any, Any], names: list[Any], needed: list[Any]) -> list[Mapping[Any, Any]]:
    listed = [isinstance(value, (list, tuple, pd.Series)) or _is_array(value) for value in data.values()]
    _require_columns(list(data), names, needed)
    if not any(listed):
        return [data]
    if not all(listed):
        raise InputError(
            "Some columns are lists and some are single values",
            where=_listed(list(data)),
            wanted="lists everywhere (many rows) or single values everywhere (one row)",
            found=", ".join(f"{name!r}: {type(value).__name__}" for name, value in data.items()),
        )
    values = {name: value.tolist() if hasattr(value, "tolist") else list(value) for name, value in data.items()}
    lengths = {name: len(column) for name, column in values.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            "Columns have different lengths",
            where=f"row {min(lengths.values())}, {_listed(list(data))}",
            wanted="one value for each row in each column",
            found=", ".join(f"{name!r}: {length}" for name, length in lengths.items()),
        )
    return _zip_columns(values, next(iter(lengths.values())))


def _from_array(array: np.ndarray, names: list[Any]) -> list[Mapping[Any, Any]]:
    if array.ndim == 2:
        return _from_list([tuple(row) for row in array.tolist()], names)
    if array.ndim == 1:
        return _from_values(array.tolist(), names, "1-D array")
    if array.ndim == 0:
        return _from_values([array.item()], names, "single value")
    raise InputError(
        "An array has too many dimensions",
        where=_listed(names),
        wanted=f"shape (rows,) or (rows, {len(names)})",
        found=f"shape {array.shape}",
    )


def _from_list(data: Sequence[Any], names: list[Any]) -> list[Mapping[Any, Any]]:
    """Row 0 says what the rows of a list are: dicts, sequences of values, or values."""
    first = data[0] if data else None
    if isinstance(first, Mapping):
        return [_same_shape(i, item, Mapping, "a dict", names) for i, item in enumerate(data)]
    # For a model of one column a nested list is a bad value. A tuple of one is a row all the same, which is what
    # a 2-D array and a database cursor give.
    if isinstance(first, tuple) or (isinstance(first, list) and len(names) > 1):
        rows = [_same_shape(i, item, (list, tuple), "a list of values", names) for i, item in enumerate(data)]
        return [_from_sequence(i, row, names) for i, row in enumerate(rows)]
    return _from_values(data, names, "list")


def _same_shape(i: int, item: Any, kinds: Any, wanted: str, names: list[Any]) -> Any:
    if not isinstance(item, kinds):
        raise InputError(
            "Rows of a list have different shapes",
            where=place(i, *names),
            wanted=f"{wanted}, as row 0 is",
            found=describe_value(item),
        )
    return item


def _from_sequence(i: int, values: Sequence[Any], names: list[Any]) -> Mapping[Any, Any]:
    if len(values) != len(names):
        raise InputError(
            "A row has the wrong number of values",
            where=place(i, *names),
            wanted=f"{len(names)}, in this order: {_listed(names)}",
            found=f"{len(values)}",
        )
    return dict(zip(names, values, strict=True))


def _from_values(values: Iterable[Any], names: list[Any], kind: str) -> list[Mapping[Any, Any]]:
    values = list(values)
    if len(names) > 1 and values:
        raise InputError(
            f"A {kind} of single values cannot fill several columns",
            where=place(0, *names),
            wanted=f"a DataFrame, or dicts, with {_listed(names)}",
            found=f"one value a row, the first is {describe_value(values[0])}",
        )
    return [{names[0]: value} for value in values]


def _zip_columns(values: Mapping[Any, list[Any]], count: int) -> list[Mapping[Any, Any]]:
    return [{name: column[i] for name, column in values.items()} for i in range(count)]


# One record → one row.


def _row(i: int, record: Mapping[Any, Any], columns: Mapping[str, Any], needed: list[Any], missing: bool) -> Row:
    _require_columns(list(record), list(columns.values()), needed, row=i)
    row = {field: _unboxed(record[column]) for field, column in columns.items() if column in record}
    for field, value in row.items():
        if not missing and _is_missing(value):
            raise InputError(
                "A value is missing",
                where=place(i, columns[field]),
                wanted="a value",
                found=describe_value(value),
                way_out="drop the row or fill the value, for example data.dropna()",
            )
    return row


def _require_columns(there: list[Any], known: list[Any], needed: list[Any], *, row: int | None = None) -> None:
    """Refuse missing columns, and columns that nobody knows."""
    prefix = "" if row is None else f"row {row}, "
    if missing := [name for name in needed if name not in there]:
        raise InputError(
            "A column is missing",
            where=prefix + _listed(missing),
            wanted=_listed(known),
            found=f"only {there}" if there else "no columns",
            way_out="rename the columns of the data, or log the model with input_columns=... as the data has them",
        )
    if extra := [name for name in there if name not in known]:
        raise InputError(
            "There are columns that the model does not know",
            where=prefix + _listed(extra),
            wanted=f"only {_listed(known)}",
            found=f"{there}",
            way_out=f"select the columns first: data[{known}]",
        )


def _is_missing(value: Any) -> bool:
    # pd.isna would answer for each element of a list; these are all the scalars it knows.
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


def _unboxed(value: Any) -> Any:
    """The value in an array without dimensions, which MLflow's server makes of each text in a list of dicts."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Sequence[Any]) -> str:
    if list(names) == [None]:
        return "one column"
    return f"column{'s' if len(names) > 1 else ''} {' and '.join(map(repr, names))}"
