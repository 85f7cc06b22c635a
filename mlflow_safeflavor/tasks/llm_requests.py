"""Requests of OpenAI's API: fields beside what is asked, and lists of texts in one request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value, is_missing

__all__ = ["fields_of", "flat_texts", "without_fields"]


def fields_of(data: Any, names: Collection[str]) -> dict[str, Any]:
    """Params that a request brings beside its texts, as columns or keys; missing values are none.

    Args:
        data: Of ``predict``, in any shape.
        names: Of params.

    Raises:
        InputError: Two rows want another value; names row and column.
    """
    found: dict[str, Any] = {}
    for i, row in enumerate(_rows_of(data, names)):
        for name in names & row.keys():
            value = row[name]
            value = value.tolist() if isinstance(value, np.ndarray) else value
            if is_missing(value):  # MLflow's schema has a cell for a field that was not sent
                continue
            if found.setdefault(name, value) != value:
                raise InputError(
                    "Rows of one request ask for different params",
                    where=format_cell(i, name),
                    wanted=format_value(found[name]),
                    found=format_value(value),
                    hint="send one request for each",
                )
    return found


def _rows_of(data: Any, names: Collection[str]) -> Sequence[Mapping[str, Any]]:
    if isinstance(data, pd.DataFrame):
        there = [name for name in data.columns if name in names]
        return data[there].to_dict("records") if there else []
    if isinstance(data, Mapping):
        return [data]
    return [row for row in data if isinstance(row, Mapping)] if isinstance(data, list) else []


def without_fields(data: Any, names: Collection[str]) -> Any:
    """The data without those params."""
    if isinstance(data, pd.DataFrame):
        return data[[name for name in data.columns if name not in names]]
    if isinstance(data, Mapping):
        return {name: value for name, value in data.items() if name not in names}
    if isinstance(data, list):
        return [without_fields(row, names) if isinstance(row, Mapping) else row for row in data]
    return data


def flat_texts(data: Any, column: str) -> Any:
    """Rows of any shape, and each text of a list that takes the place of one."""
    if isinstance(data, pd.DataFrame) and list(data.columns) == [column]:
        data = {column: data.iloc[:, 0].tolist()}
    elif isinstance(data, list) and all(_has_alone(row, column) for row in data):
        data = {column: [row[column] for row in data]}
    cells = data.get(column) if _has_alone(data, column) else None
    # A list in the place of a text is a whole request of OpenAI's API, or a row of one.
    if isinstance(cells, (list, tuple, np.ndarray)):
        return {column: [text for i, cell in enumerate(cells) for text in _texts(cell, i, column)]}
    return data


def _has_alone(row: Any, column: str) -> bool:
    return isinstance(row, Mapping) and list(row) == [column]


def _texts(cell: Any, i: int, column: str) -> Sequence[Any]:
    """The texts of one cell."""
    cell = cell.tolist() if isinstance(cell, np.ndarray) else cell
    # OpenAI's API also takes token ids, of OpenAI's tokenizers; LangChain sends them by default.
    if type(cell) is int or (isinstance(cell, list) and any(type(part) is int for part in cell)):
        raise InputError(
            "Numbers of tokens belong to another tokenizer, so that they cannot be read here",
            where=format_cell(i, column),
            wanted="a text, or a list of texts",
            found="a list of whole numbers",
            hint="send texts; LangChain does with "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)",
        )
    return cell if isinstance(cell, list) else [cell]
