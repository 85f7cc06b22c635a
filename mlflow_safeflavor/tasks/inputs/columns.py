"""Columns of a table: known, missing and extra ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.wording import named_in_words

__all__ = ["named_columns", "require_columns", "without_extra_columns"]


def without_extra_columns(data: Any, known: Collection[str]) -> Any:
    """A table or its rows without columns that the model does not know; anything else untouched.

    Args:
        data: The user's.
        known: Columns of the model.
    """
    if isinstance(data, pd.DataFrame):
        # Not data[known]: a missing column is an error that names it, later.
        return data[[name for name in data.columns if name in known]]
    if isinstance(data, Mapping):
        return {name: value for name, value in data.items() if name in known}
    if isinstance(data, list):
        return [
            without_extra_columns(row, known) if isinstance(row, Mapping) else row for row in data
        ]
    return data


def named_columns(columns: Mapping[str, str | None], data: Any) -> Mapping[str, Any]:
    """The columns; one without a name gets that of the only column of ``data``, if it has names."""
    table = (
        data[0]
        if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping)
        else data
    )
    if None not in columns.values() or not isinstance(table, (pd.DataFrame, Mapping)):
        return columns
    [field], there = (
        columns,
        table.columns.tolist() if isinstance(table, pd.DataFrame) else list(table),
    )
    # MLflow's pyfunc takes the first without a word; natively nothing says which is meant.
    if len(there) > 1:
        named = {field: str(there[0])}
        raise InputError(
            "There are several columns, and the model takes one",
            where=named_in_words(there),
            wanted="one column, whatever its name",
            found=f"{there}",
            hint=f"select it first: data[[{there[0]!r}]], or log the model with "
            f"input_columns={named}",
        )
    return {field: there[0]} if there else columns


def require_columns(
    there: list[Any], known: list[Any], needed: list[Any], *, row: int | None = None
) -> None:
    """Refuse missing columns, and columns that the model does not know."""
    prefix = "" if row is None else f"row {row}, "
    # Missing ones first: a misspelt column is both, and its name is what is wanted.
    if missing := [name for name in needed if name not in there]:
        raise InputError(
            "A column is missing",
            where=prefix + named_in_words(missing),
            wanted=named_in_words(known),
            found=f"only {there}" if there else "no columns",
            hint="rename the columns of the data, or log the model with input_columns=... as the "
            "data has them",
        )
    if extra := [name for name in there if name not in known]:
        raise InputError(
            "There are columns that the model does not know",
            where=prefix + named_in_words(extra),
            wanted=f"only {named_in_words(known)}",
            found=f"{there}",
            hint=f"select the columns first: data[{known}]",
        )
