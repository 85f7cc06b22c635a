"""Per-request params: declared once, from which both the signature and the check are made."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from mlflow.types import DataType, ParamSchema, ParamSpec

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import InputError, IntegrityError

__all__ = ["Param", "check_defaults", "check_params", "param_of", "param_schema", "with_defaults"]


@dataclass(frozen=True)
class Param:
    """One per-request param.

    Attributes:
        name: As users write it.
        kind: Its type in the signature.
        many: Whether it is a list of that type.
        default: Used where a request does not give it. Never None: a signature's default has a
            type, and clients read from it what they may send.
        wanted: What values are allowed, in words.
        allows: Whether a value of the right type is in range.
        none_is: What None stands for; where it is None itself, None is refused.
    """

    name: str
    kind: Literal["long", "boolean", "string", "double"]
    default: Any
    wanted: str
    allows: Callable[[Any], bool] = lambda value: True
    none_is: Any = None
    many: bool = False


def param_of(name: str, value: Any) -> Param:
    """A param of the user's own, of the type of its default.

    Raises:
        InputError: The default has no type that a signature knows.
    """
    many = isinstance(value, (list, tuple)) and len(value) > 0
    kinds: tuple[Literal["boolean", "long", "double", "string"], ...] = (
        "boolean",
        "long",
        "double",
        "string",
    )
    for kind in kinds:  # the narrowest first: 1 is a double, too
        # An empty list has no type, and is refused.
        plain = _plain_list(kind, value) if many else _plain(kind, value)
        if plain is not None:
            return Param(
                name,
                kind,
                plain,
                wanted=f"{'a list of type' if many else 'of type'} {kind}",
                many=many,
            )
    raise InputError(
        "The default of a param has no type that a signature knows",
        where=f"params, {name!r}",
        wanted="a text, a number, a truth value, or a list of one of these",
        found=f"{type(value).__name__} {value!r}",
    )


def param_schema(declared: Sequence[Param]) -> ParamSchema:
    """The params part of a signature."""
    return ParamSchema(
        [
            ParamSpec(
                param.name, DataType[param.kind], param.default, (-1,) if param.many else None
            )
            for param in declared
        ]
    )


def check_defaults(
    task: str, declared: Sequence[Param], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Defaults to save with a model, in plain Python types: those that are given, and no others.

    Args:
        task: Name of the task, for the message.
        declared: What it knows.
        given: Name → value, as in a request.

    Raises:
        InputError: The task does not know a param, or its value is of another type or out of range;
            names it.
    """
    known = {param.name for param in declared}
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            f"The task {task} does not know a param",
            where=f"params, {', '.join(map(repr, unknown))}",
            wanted=" | ".join(param.name for param in declared) or "none: this task has no params",
            hint="leave it out, or choose the task that knows it: task=…",
        )
    checked = check_params(declared, given)
    return {name: checked[name] for name in given}


def with_defaults(declared: Sequence[Param], saved: Mapping[str, Any]) -> tuple[Param, ...]:
    """Params with the defaults that were saved with a model.

    Raises:
        IntegrityError: A default is none that ``check_defaults`` would have let pass.
    """
    try:
        checked = check_params(declared, saved)
    # The artifact's fault and not the caller's, who has sent nothing yet.
    except InputError as error:
        raise IntegrityError(
            "A default of a param is malformed",
            where=f"task_config, {error.where}",
            hint=FETCH_AGAIN,
        ) from error
    return tuple(replace(param, default=checked[param.name]) for param in declared)


def check_params(declared: Sequence[Param], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every declared param, as given or by default, in plain Python types.

    Args:
        declared: What the task knows.
        given: What the request says.

    Raises:
        InputError: A param is unknown, of another type or out of range; names it.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(
            "params is no dict", where="params", wanted="a dict", found=type(given).__name__
        )
    known = [param.name for param in declared]
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            "Unknown param",
            where=f"params, {', '.join(map(repr, unknown))}",
            wanted=f"one of {', '.join(known)}",
        )
    return {
        param.name: _checked(param, given[param.name]) if param.name in given else param.default
        for param in declared
    }


def _checked(param: Param, value: Any) -> Any:
    plain = (
        param.none_is
        if value is None
        else _plain_list(param.kind, value)
        if param.many
        else _plain(param.kind, value)
    )
    if plain is None or not param.allows(plain):
        raise InputError(
            "A param has a value that is not allowed",
            where=f"params, {param.name!r}",
            wanted=param.wanted,
            # Shortened: a value of megabytes would go into the answer and the log.
            found=f"{type(value).__name__} {reprlib.repr(value)}",
        )
    return plain


def _plain_list(kind: str, value: Any) -> list[Any] | None:
    items = (
        [_plain(kind, item) for item in value]
        if isinstance(value, (list, tuple, np.ndarray))
        else [None]
    )
    return None if None in items else items


def _plain(kind: str, value: Any) -> Any:
    """The value as the Python type of ``kind``; None where it is of another type."""
    if kind == "boolean":
        return bool(value) if isinstance(value, (bool, np.bool_)) else None
    if kind == "string":
        return str(value) if isinstance(value, str) else None
    if isinstance(value, (bool, np.bool_)):  # True is 1 in Python: {"top_k": true} is a mistake
        return None
    if kind == "double":
        # Python's reader of JSON takes NaN and Infinity, which are in no range.
        return (
            float(value)
            if isinstance(value, (int, float, np.integer, np.floating)) and np.isfinite(value)
            else None
        )
    try:
        return operator.index(value)  # int() would make 2 of 2.7 and of "2"
    except TypeError:
        return None
