"""Rows of the data that users pass to ``predict``: in order, nothing guessed or dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.columns import named_columns, require_columns
from mlflow_safeflavor.tasks.inputs.tables import read_table
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value, is_missing

__all__ = ["Row", "rows_of"]

# One row of the user's, by *field* of the task (``text``), not by column name (``buggy_code``).
Row = Mapping[str, Any]


def rows_of(
    data: Any,
    columns: Mapping[str, str | None],
    required: Collection[str] | None = None,
    *,
    missing: bool = False,
) -> list[Row]:
    """Rows by field, in order, from any shape that users hold data in.

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
        columns: Field → column name, in the task's order. A sole column may have None for a name:
            then the one column of ``data`` is it, under any name.
        required: Fields that every row must have; by default all of ``columns``. A field that is
            not required may be absent as a column, but where its column exists no value may be
            missing.
        missing: Take None, NaN and NA as values.

    Raises:
        InputError: The shape is none of the above; there are no rows; a column is missing, unknown
            or of another length; a value is None, NaN or NA, where these are none.
    """
    columns = named_columns(columns, data)
    needed = [columns[field] for field in columns if required is None or field in required]
    given = read_table(data, list(columns.values()), needed)
    if not given:
        raise InputError(
            "There are no rows to predict",
            wanted="at least one row",
            found=f"an empty {type(data).__name__}",
        )
    return [_row(i, row, columns, needed, missing) for i, row in enumerate(given)]


def _row(
    i: int, given: Mapping[Any, Any], columns: Mapping[str, Any], needed: list[Any], missing: bool
) -> Row:
    # Row by row: dicts of a list may each lack another column.
    require_columns(list(given), list(columns.values()), needed, row=i)
    row = {field: _unboxed(given[column]) for field, column in columns.items() if column in given}
    for field, value in row.items():
        if not missing and is_missing(value):
            raise InputError(
                "A value is missing",
                where=format_cell(i, columns[field]),
                wanted="a value",
                found=format_value(value),
                hint="drop the row or fill the value, for example data.dropna()",
            )
    return row


def _unboxed(value: Any) -> Any:
    """The value of a 0-d array, which MLflow's server makes of each text in a list of dicts."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
