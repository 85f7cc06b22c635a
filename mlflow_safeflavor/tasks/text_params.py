"""Params of the tasks that read text."""

from __future__ import annotations

from mlflow_safeflavor.tasks.params import Param

__all__ = ["MAX_LENGTH", "TRUNCATION"]

MAX_LENGTH = Param(
    "max_length",
    "long",
    default=0,
    wanted="a whole number of tokens, or 0 for as many as the model takes",
    allows=lambda value: value >= 0,
    none_is=0,
)
TRUNCATION = Param("truncation", "boolean", default=True, wanted="true or false")
