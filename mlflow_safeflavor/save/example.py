"""The user's example: rows, and the params to ask about them with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlflow.models import Model
from mlflow.models.utils import _save_example

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.tasks.base import Task

__all__ = ["split_example", "write_example"]


def split_example(given: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """Rows and params; a tuple of both is told from a tuple of rows as MLflow tells it."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict):
        rows, params = given
        if not (isinstance(rows, dict) and rows.keys() == params.keys()):  # else two rows
            return rows, params
    return given, None


def write_example(
    mlmodel: Model, rows: Any, params: Mapping[str, Any] | None, task: Task, layout: Layout
) -> None:
    """Store the user's example as MLflow does."""
    if rows is None:
        return
    stored = task.stored_example(rows)
    example = stored if params is None else (stored, dict(params))
    _save_example(mlmodel, example, os.fspath(layout.root))
