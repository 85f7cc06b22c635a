"""Rows of the user's, read from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from mlflow.types import DataType, Schema

from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.errors import InputError

__all__ = ["read_rows"]


def read_rows(rows: pd.DataFrame | str | Path, schema: Schema) -> pd.DataFrame:
    """Rows of a frame or of a file, by its ending; at least one.

    Raises:
        InputError: The file cannot be read, or there are none.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else _read(rows, schema)
    if frame.empty:
        raise InputError(
            "There are no rows to compare", where="rows", wanted="at least one row", found="none"
        )
    return frame


def _read(path: str | Path, schema: Schema) -> pd.DataFrame:
    # Columns that the model takes as texts stay texts: pandas makes 7 of "007" and nan of "NA".
    # A column without a name is any column of the file, so all are read as texts.
    texts = [spec.name for spec in schema.inputs if spec.type == DataType.string]
    readers: dict[str, Callable[[], pd.DataFrame]] = {
        ".csv": lambda: pd.read_csv(
            path,
            dtype=str if texts == [None] else dict.fromkeys(texts, str),
            keep_default_na=len(texts) < len(schema.inputs),
        ),
        ".json": lambda: _read_json(path, lines=False),
        ".jsonl": lambda: _read_json(path, lines=True),
        ".ndjson": lambda: _read_json(path, lines=True),
        ".parquet": lambda: pd.read_parquet(path),
    }
    ending = Path(path).suffix.lower()
    if ending not in readers:
        raise InputError(
            "Rows cannot be read from this file",
            where=path,
            wanted=" | ".join(readers),
            found=ending,
        )
    try:
        return readers[ending]()
    # All these are raised by pandas and pyarrow over files that are not of the kind.
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            "Rows cannot be read from this file", where=path, wanted=ending[1:], found=error
        ) from None


def _read_json(path: str | Path, *, lines: bool) -> pd.DataFrame:
    """Records of a JSON file, with values as they stand there."""
    # Not pandas' read_json, which makes dates and numbers of texts that look like them.
    text = Path(path).read_text(encoding="utf-8-sig")
    # Not splitlines, which also cuts at line separators within texts.
    parts = [line for line in text.split("\n") if line.strip()] if lines else [text]
    read = [parse_json(part, strict=False) for part in parts]
    records = read if lines else read[0]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("not a list of objects")
    return pd.DataFrame(records)
