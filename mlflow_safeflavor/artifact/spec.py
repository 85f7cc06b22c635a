"""The spec: facts about a saved model, as the ``safeflavor`` entry of ``MLmodel`` has them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import yaml

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN, read_text
from mlflow_safeflavor.errors import FormatVersionError, IntegrityError

__all__ = [
    "AS_IS",
    "DTYPES",
    "FLAVOR_NAME",
    "FORMAT_VERSION",
    "STRUCTURE_KINDS",
    "ModelSpec",
    "guarded_parts",
    "is_plain_text",
    "is_scalar",
    "read_spec",
]

FLAVOR_NAME = "safeflavor"

# The rule of change: this number goes up by one whenever a loader of an older release could misread
# a new artifact (a file or key that older code would ignore but must not, or a changed meaning).
# Adding something that older loaders may safely ignore leaves it alone. A release reads its own
# version and all earlier ones; one tiny saved model for each released version stays in
# tests/formats/ so that this promise is tested and not only made.
FORMAT_VERSION = 1

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Serving dtype of a module whose weights have several, and keep them.
AS_IS = "as-is"

STRUCTURE_KINDS = ("transformers", "torch", "import", "pickle", "graph")


_NAME = r"[^\W\d]\w*"
_QUALNAME = rf"({_NAME}|<locals>|<lambda>)"
# Used with fullmatch. None of these may hold the end of a line, or a sign that a shell, Dockerfile
# or terminal obeys: readers print them, and write them into files.
_PATTERNS = {
    "task": (r"[a-z0-9]{1,40}([-/][a-z0-9]{1,40}){0,5}", "words of small letters with - or /"),
    "model_class": (
        rf"(?=.{{1,1000}}\Z){_NAME}(\.{_NAME})*:{_QUALNAME}(\.{_QUALNAME})*",
        "module:qualname",
    ),
    "loader_version": (r"\d[0-9A-Za-z.+!-]{0,63}", "a version"),
    "loader_digest": (r"[0-9a-f]{64}", "64 hexadecimal digits"),
    "cast_from": (r"([a-z][a-z0-9_]{0,19}(, (?=.))?){0,8}", "names of dtypes"),
}
_MAX_TEXT = 1000  # characters of a column's name or an option
_MAX_NESTING = 20
_RUNS = ("code", "pickle")


def is_plain_text(value: object) -> bool:
    """Whether it is one line of readable length without control characters."""
    return isinstance(value, str) and value.isprintable() and len(value) <= _MAX_TEXT


def is_scalar(value: object) -> bool:
    """Whether it is a JSON value without parts: a plain text, finite number, bool or None."""
    if isinstance(value, (bool, int)):
        return -(2**63) <= value < 2**63
    return (
        value is None or is_plain_text(value) or (isinstance(value, float) and math.isfinite(value))
    )


def _is_json(value: object, nesting: int = 0) -> bool:
    """Whether it is JSON; texts may have several lines here, as prompts and labels do."""
    # A spec is made in code, too, where no parser has bounded its depth.
    if nesting > _MAX_NESTING:
        return False
    if isinstance(value, Mapping):
        return all(
            isinstance(key, str) and _is_json(part, nesting + 1) for key, part in value.items()
        )
    if isinstance(value, (list, tuple)):
        return all(_is_json(part, nesting + 1) for part in value)
    return isinstance(value, str) or is_scalar(value)


def _find_malformed(spec: ModelSpec) -> Iterator[tuple[str, str, object]]:
    """Where, wanted and found of every field with a value that no save writes."""
    for name, (pattern, words) in _PATTERNS.items():
        value = getattr(spec, name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            yield name, words, value
    for name, allowed in (("dtype", (*DTYPES, AS_IS)), ("structure", STRUCTURE_KINDS)):
        if getattr(spec, name) not in allowed:
            yield name, " | ".join(allowed), getattr(spec, name)
    if any(kind not in _RUNS for kind in spec.runs):
        yield "runs", " | ".join(_RUNS), list(spec.runs)
    for field_name, column in spec.input_columns.items():
        unnamed = column is None and len(spec.input_columns) == 1
        if not is_plain_text(field_name) or not (unnamed or is_plain_text(column)):
            yield "input_columns", "names of one line, or a sole null", {field_name: column}
    for option, value in spec.model_config.items():
        if not is_plain_text(option) or not is_scalar(value):
            yield "model_config", "names with numbers, truth values or short texts", {option: value}
    if not _is_json(spec.task_config):
        yield "task_config", f"JSON, at most {_MAX_NESTING} levels deep", spec.task_config


@dataclass(frozen=True)
class ModelSpec:
    """Facts about one saved model, checked whenever one is made.

    Attributes:
        task: Name in ``mlflow_safeflavor.tasks.table.TASKS``.
        dtype: Serving dtype of the floating point weights; one of ``DTYPES`` or ``AS_IS``.
        structure: How the module is rebuilt; one of ``STRUCTURE_KINDS``.
        model_class: ``module:qualname`` of the module's class.
        task_config: Facts that the task recorded at save (pooling, labels, padding, …); JSON only.
        input_columns: Field of the task → column name in the user's rows; None for a sole column
            without a name.
        model_config: Run-time options with their stored defaults.
        loader_version: Release of this package that wrote the artifact.
        loader_digest: SHA-256 over the vendored loader's source.
        cast_from: Dtypes of weights before a cast to ``dtype`` that the user did not ask for.
        runs: Kinds of agreement that the caller must give: "code", "pickle".
        format_version: See ``FORMAT_VERSION``.
    """

    task: str
    dtype: str
    structure: str
    model_class: str
    loader_version: str
    loader_digest: str
    cast_from: str = ""
    runs: tuple[str, ...] = ()
    task_config: Mapping[str, Any] = field(default_factory=dict)
    input_columns: Mapping[str, str | None] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for where, wanted, found in _find_malformed(self):
            raise IntegrityError(
                "The safeflavor entry of MLmodel has a value that no save writes",
                where=f"MLmodel, {where}",
                wanted=wanted,
                found=repr(found)[:200],
                hint=f"if you are saving it, give it such a {where}; otherwise {FETCH_AGAIN}",
            )
        for name in ("task_config", "input_columns", "model_config"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "runs", tuple(self.runs))

    def to_flavor(self) -> dict[str, Any]:
        """The JSON-able entry written to ``MLmodel``; ``from_flavor`` reads it back."""
        entry = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        entry["runs"] = list(self.runs)
        return {
            name: dict(value) if isinstance(value, MappingProxyType) else value
            for name, value in entry.items()
        }

    @classmethod
    def from_flavor(cls, entry: Mapping[str, Any]) -> ModelSpec:
        """Read the entry of ``MLmodel``.

        Raises:
            FormatVersionError: A newer release wrote it.
            IntegrityError: A key is missing or of the wrong type.
        """
        if not isinstance(entry, Mapping):
            raise IntegrityError(
                "The safeflavor entry of MLmodel is malformed",
                where="MLmodel",
                wanted="a mapping",
                found=repr(entry),
            )
        # The version first: of a newer format no other key is known to mean the same.
        version = entry.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise IntegrityError(
                "MLmodel has no usable format_version",
                where="MLmodel",
                wanted="a whole number",
                found=repr(version),
            )
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                "The model was saved in a format that this release does not read",
                where="MLmodel",
                wanted=f"format_version {FORMAT_VERSION} or older",
                found=f"format_version {version}, written by mlflow-safeflavor "
                f"{entry.get('loader_version')}",
                hint=f"install mlflow-safeflavor {entry.get('loader_version')} or newer",
            )
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        for name in types.keys() - entry.keys():
            raise IntegrityError(
                "The safeflavor entry of MLmodel is incomplete",
                where="MLmodel",
                wanted=name,
                found="no such key",
            )
        for name, type_name in types.items():
            expected: type = {"str": str, "int": int, "tuple[str, ...]": list}.get(
                str(type_name), Mapping
            )
            if not isinstance(entry[name], expected):
                raise IntegrityError(
                    "A key of the safeflavor entry of MLmodel has the wrong type",
                    where=f"MLmodel, {name}",
                    wanted=expected.__name__,
                    found=type(entry[name]).__name__,
                )
        return cls(**{name: entry[name] for name in types})


def read_spec(layout: Layout) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec in ``MLmodel``, and the parts of that file that the manifest guards.

    Raises:
        IntegrityError: ``MLmodel`` is missing, malformed, or of another flavor.
        FormatVersionError: A newer release wrote it.
    """
    with suppress(PermissionError):  # the reader below words it
        if not os.path.lexists(layout.mlmodel):
            raise IntegrityError(
                "There is no MLflow model",
                where=layout.root,
                wanted=layout.MLMODEL,
                hint=FETCH_AGAIN,
            )
    try:
        content = yaml.safe_load(read_text(layout.mlmodel, layout.limit_of(layout.MLMODEL) or 0))
        entry = content["flavors"][FLAVOR_NAME]
    # YAML makes dates of texts like 2026-13-40, and raises ValueError for those of no calendar.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            "MLmodel cannot be read", where=layout.mlmodel, found=error, hint=FETCH_AGAIN
        ) from None
    except (KeyError, TypeError):
        raise IntegrityError(
            "This MLflow model was not saved by mlflow-safeflavor",
            where=layout.mlmodel,
            wanted=f"a flavor named {FLAVOR_NAME}",
            hint="load it with the flavor that saved it",
        ) from None
    return ModelSpec.from_flavor(entry), guarded_parts(content)


def guarded_parts(mlmodel: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of ``MLmodel`` that predictions depend on; MLflow changes only the rest."""
    return {name: mlmodel.get(name) for name in ("flavors", "signature")}
