"""Edits of a saved model's signature by MLflow: which change no answer, and which may."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow_safeflavor.artifact.layout import Layout

__all__ = ["find_signature_edits"]

_SAVED_OTHERWISE = "is not the one that was saved"


class _Refused(Exception):
    """A part of a signature that MLflow would read requests or answers by otherwise."""


def find_signature_edits(saved: Any, found: Any) -> tuple[list[str], list[str]]:
    """Differences of a signature from the saved one: those that change no answer, and the others.

    ``mlflow.models.set_signature`` rewrites it, and MLflow casts, drops and fills in requests by
    it before any model sees them. So types, defaults and names of columns stay; what may change is
    that the sole column gets a name, that a column is optional, and that params or answers are not
    declared.

    Args:
        saved: Part of ``MLmodel`` as it was sealed: ``inputs``, ``outputs`` and ``params``, each
            JSON as a text or None.
        found: The same, now.
    """
    if saved == found:
        return [], []
    try:
        tolerated = [*_edits(saved, found)]
    except (_Refused, KeyError, TypeError) as error:  # of no signature that MLflow writes
        reason = str(error) if isinstance(error, _Refused) else ""
        return [], [f"{Layout.MLMODEL}: its signature {reason or _SAVED_OTHERWISE}"]
    return [f"{Layout.MLMODEL}: its signature {edit}" for edit in tolerated], []


def _edits(saved: Any, found: Any) -> Iterator[str]:
    parts = {"inputs", "outputs", "params"}
    for signature in (saved, found):
        if not isinstance(signature, Mapping) or not signature.keys() <= parts:
            raise _Refused
    old, new = ({part: _parsed(one.get(part)) for part in parts} for one in (saved, found))
    yield from _edits_of_inputs(old["inputs"], new["inputs"])
    if old["outputs"] != new["outputs"]:
        if new["outputs"] is not None and _columns(old["outputs"]) != _columns(new["outputs"]):
            raise _Refused(
                f"says other answers: {_few(new['outputs'])}, wanted {_few(old['outputs'])}"
            )
        yield "no longer says what is answered" if new["outputs"] is None else "was written anew"
    if old["params"] != new["params"]:
        params = {param["name"]: param for param in _listed(old["params"])}
        for param in _listed(new["params"]):
            if param != params.pop(param.get("name"), None):
                raise _Refused(f"has another param: {_few(param)}")
        dropped = f"no longer declares {', '.join(params)}, which MLflow drops from requests"
        yield dropped if params else "was written anew"


def _edits_of_inputs(old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    saved, found = _columns(old), _columns(new)
    # A sole column without a name takes any, so a name for it changes no answer.
    if len(saved) == len(found) == 1 and list(saved) == [None]:
        (name,) = found
        saved = {name: saved[None]}
    if not found or [*saved.items()] != [*found.items()]:
        raise _Refused(f"has other inputs: {_few(new)}, wanted {_few(old)}")
    yield f"names its columns {', '.join(map(repr, found))}, or which of them are required"


def _columns(schema: Any) -> dict[str | None, Any]:
    """Name → all that is said of a column but whether it is required."""
    return {
        column.get("name"): {
            key: value
            for key, value in column.items()
            if not (key in ("name", "required") and isinstance(value, (str, bool)))
        }
        for column in _listed(schema)
    }


def _few(value: Any) -> str:
    return reprlib.repr(value)


def _listed(schema: Any) -> list[Mapping[str, Any]]:
    columns = [] if schema is None else schema
    if not isinstance(columns, list) or not all(isinstance(one, Mapping) for one in columns):
        raise _Refused
    return columns


def _parsed(text: Any) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise _Refused from None
