"""Run-time options: the model's, overridden by ``model_config``, overridden by the environment."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.caps import Caps

__all__ = [
    "MODEL_CONFIG",
    "asked_options",
    "is_set",
    "require_known_options",
    "run_time_options",
    "tells_environment",
]

_PREFIX = "MLFLOW_SAFEFLAVOR_"


def _refuse(name: str, wanted: str, found: object) -> InputError:
    return InputError("Not a usable run-time option", where=name, wanted=wanted, found=repr(found))


def _as_given(name: str, value: Any) -> Any:
    """A value that its reader checks: the environment before torch, or torch itself."""
    return value


def _whole_number(name: str, value: Any, *, least: int) -> int:
    try:
        # index() refuses 2.5, of which int() would make 2.
        number = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if number < least or isinstance(value, bool):  # True is 1 in Python
        raise _refuse(name, f"a whole number ≥ {least}", value)
    return number


def _seconds(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    # float() takes "inf" and "nan", for which no lock can wait.
    if not 0 <= number < math.inf or isinstance(value, bool):
        raise _refuse(name, "a number of seconds ≥ 0", value)
    return number


def _cap(name: str, value: Any) -> float:
    return _seconds(name, value) if name == "max_seconds" else _whole_number(name, value, least=0)


def _truth(name: str, value: Any) -> bool:
    truth = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if truth is None:
        raise _refuse(name, "true | false", value)
    return truth


def _one_of(name: str, value: Any, *, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise _refuse(name, " | ".join(allowed), value)
    return str(value)


_OPTIONS: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "device": ("auto", _as_given),
    "dtype": ("", _as_given),
    "engine": ("auto", partial(_one_of, allowed=("auto", "onnx", "openvino", "module"))),
    "compile": (False, _truth),
    "num_threads": (0, partial(_whole_number, least=0)),
    "max_batch_tokens": (512, partial(_whole_number, least=1)),
    "forward_cost": (0, partial(_whole_number, least=0)),
    "deterministic": (False, _truth),
    "max_queue": (1024, partial(_whole_number, least=0)),
    "max_wait": (30.0, _seconds),
    "max_body": (100_000_000, partial(_whole_number, least=0)),
    "timeout": (0.0, _seconds),
    **{cap.name: (cap.default, _cap) for cap in fields(Caps)},
    "extra_columns": ("error", partial(_one_of, allowed=("error", "ignore"))),
    "verify": ("full", _as_given),
    "environment": ("warn", _as_given),
}

# Every option and its default. MLflow only lets stored keys be overridden, so all are stored.
#
# An empty dtype is the one the model was saved in; 0 threads is what the process may use; a
# ``forward_cost`` of 0 is measured: when the model is saved, and again where that was on another
# kind of device.
MODEL_CONFIG: dict[str, Any] = {name: default for name, (default, _) in _OPTIONS.items()}


def asked_options(
    model_config: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """The options that the caller sets: ``MLFLOW_SAFEFLAVOR_…`` over ``model_config``."""
    from_environment = {
        name: value for name in MODEL_CONFIG if (value := environ.get(_PREFIX + name.upper()))
    }
    return {**(model_config or {}), **from_environment}


def run_time_options(
    asked: Mapping[str, Any], stored: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every option's value: the asked one, else the stored one, else the default.

    Raises:
        InputError: A value is not of its option's kind, or ``model_config`` has an unknown key.
    """
    require_known_options(asked, MODEL_CONFIG)
    chosen = {**MODEL_CONFIG, **(stored or {}), **asked}
    return {name: check(name, chosen[name]) for name, (_, check) in _OPTIONS.items()}


def require_known_options(model_config: Collection[str], known: Collection[str]) -> None:
    """Refuse keys of ``model_config`` that nothing reads.

    Raises:
        InputError: It names them, and those that are known.
    """
    if unknown := sorted({*model_config} - {*known}):
        raise InputError(
            "Unknown key in model_config",
            where=", ".join(unknown),
            wanted=" | ".join(sorted(known)),
        )


def tells_environment(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a server may tell its environment (``verify --endpoint``)."""
    # No key of ``model_config``: that comes with the model, and this is up to the server's owner.
    return is_set(f"{_PREFIX}TELL_ENVIRONMENT", environ)


def is_set(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable that switches something on is "true" or "1"."""
    return environ.get(name, "").lower() in ("true", "1")
