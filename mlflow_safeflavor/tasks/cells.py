"""Cells of the user's rows and answers: as JSON and back, and as a client would send them."""

from __future__ import annotations

import base64
import datetime
import decimal
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from mlflow_safeflavor.artifact.arrays import array_of, is_tensor
from mlflow_safeflavor.errors import InputError

__all__ = ["from_json", "plain", "sent", "to_json"]

# One key, which no user's dict is likely to have; a dict that has it is refused, not misread.
_TAG = "$type"


def plain(value: Any) -> Any:
    """A value of an answer without numpy and torch: arrays and tensors become lists of numbers.

    Texts, bytes, dates and decimals stay as they are. The result shares no memory.
    """
    if is_tensor(value):
        value = array_of(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # By identity: comparing pd.NA gives pd.NA, which has no truth value.
    return None if value is pd.NaT or value is pd.NA else value


def sent(value: Any) -> Any:
    """A cell as a client sends it.

    Bytes in base64, arrays as lists, decimals and times of day as texts.
    """
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (decimal.Decimal, datetime.time)):  # JSON has neither
        return str(value)
    if isinstance(value, Mapping):
        return {key: sent(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [sent(item) for item in value]
    return sent(value.tolist()) if isinstance(value, np.ndarray) else value


def to_json(value: Any, where: str) -> Any:
    """A cell as JSON from which ``from_json`` makes the same again, type and all.

    Args:
        value: A cell.
        where: Row and column, for the message.

    Raises:
        InputError: It is of a type that cannot be stored.
    """
    if type(value) in (bool, int, str) or value is None:
        return value
    # np.float64 is a float in Python, but comes back as itself; JSON has no infinities and NaNs.
    if isinstance(value, float) and not isinstance(value, np.generic):
        return float(value) if np.isfinite(value) else _tagged("float", repr(float(value)))
    if isinstance(value, Mapping) and _TAG not in value and all(type(key) is str for key in value):
        return {key: to_json(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, where) for item in value]
    if is_tensor(value):
        return to_json(plain(value), where)
    if value is pd.NaT or value is pd.NA:
        return _tagged("NaT" if value is pd.NaT else "NA", "")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcMmSU":
        array = np.asarray(value)
        data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        return {**_tagged("array", data), "dtype": array.dtype.str, "shape": list(array.shape)}
    for name, (kind, write, _) in _KINDS.items():
        # Exactly: a Timestamp is a datetime, and a datetime a date, and each comes back as itself.
        if type(value) is kind:
            return _tagged(name, write(value))
    raise InputError(
        "A value of a row or an answer cannot be stored",
        where=where,
        wanted="numbers, texts, bytes, numpy values and arrays, dates, decimals, None, and lists "
        "and dicts of them",
        found=type(value).__name__,
        hint="convert it before, or in the hook",
    )


def from_json(value: Any) -> Any:
    """A cell from ``to_json``'s JSON. Raises ``ValueError`` or ``KeyError`` for any other."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: from_json(item) for key, item in value.items()}
    name, text = value[_TAG], value["value"]
    if name in ("NaT", "NA"):
        return getattr(pd, name)
    if name == "array":
        dtype = np.dtype(str(value["dtype"]))
        # frombuffer would take bytes of the file for addresses of Python objects.
        if dtype.hasobject:
            raise ValueError("an array of objects")
        array = np.frombuffer(base64.b64decode(text, validate=True), dtype).reshape(value["shape"])
        return array.copy() if array.ndim else array[()]  # a copy, since bytes are read-only
    return _KINDS[name][2](text)


def _tagged(name: str, text: str) -> dict[str, Any]:
    return {_TAG: name, "value": text}


_KINDS: Mapping[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "float": (float, repr, float),
    "bytes": (
        bytes,
        lambda value: base64.b64encode(value).decode(),
        lambda text: base64.b64decode(text),
    ),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "timestamp": (pd.Timestamp, str, pd.Timestamp),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}
