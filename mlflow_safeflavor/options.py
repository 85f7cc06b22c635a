"""Run-time options: stored with the model, overridden by ``model_config``, overridden by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlflow_safeflavor.errors import InputError

__all__ = ["MODEL_CONFIG", "run_time_options", "tells_environment"]

MODEL_CONFIG: dict[str, Any] = {
    "device": "auto",
    "dtype": "",
    "engine": "auto",
    "num_threads": 0,
    "max_batch_tokens": 512,
    "verify": "full",
    "environment": "warn",
}
"""Every option and its default. MLflow only lets stored keys be overridden, so all are stored.

An empty dtype is the one the model was saved in; 0 threads is what the process may use.
"""

_ENGINES = ("auto", "module")
_PREFIX = "MLFLOW_SAFEFLAVOR_"


def run_time_options(model_config: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Every option's value: ``model_config`` over the defaults, and ``MLFLOW_SAFEFLAVOR_…`` over both.

    Raises:
        InputError: A value is not of its option's kind.
    """
    given = {name: value for name, value in (model_config or {}).items() if name in MODEL_CONFIG}
    from_environment = {
        name: environ[_PREFIX + name.upper()] for name in MODEL_CONFIG if environ.get(_PREFIX + name.upper())
    }
    options: dict[str, Any] = {**MODEL_CONFIG, **given, **from_environment}
    for name, least in (("num_threads", 0), ("max_batch_tokens", 1)):
        options[name] = _whole_number(name, options[name], least)
    if options["engine"] not in _ENGINES:
        raise InputError("Unknown engine", where="engine", wanted=" | ".join(_ENGINES), found=repr(options["engine"]))
    return options


def tells_environment(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a server may say what it runs on.

    No key of ``model_config``: that is stored by whoever saved the model, and this is for whoever runs the server.
    """
    return environ.get(f"{_PREFIX}TELL_ENVIRONMENT", "").lower() in ("true", "1")


def _whole_number(name: str, value: Any, least: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < least or isinstance(value, (bool, float)):
        raise InputError(
            "Not a usable run-time option", where=name, wanted=f"a whole number ≥ {least}", found=repr(value)
        )
    return number
