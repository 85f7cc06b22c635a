"""What a saved model is, in one frozen record that is the ``safeflavor`` entry of ``MLmodel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlflow_safeflavor.errors import FormatVersionError, IntegrityError

__all__ = ["DTYPES", "FLAVOR_NAME", "FORMAT_VERSION", "STRUCTURE_KINDS", "ModelSpec"]

FLAVOR_NAME = "safeflavor"

# The rule of change: this number goes up by one whenever a loader of an older release could misread
# a new artifact (a file or key that older code would ignore but must not, or a changed meaning).
# Adding something that older loaders may safely ignore leaves it alone. A release reads its own
# version and all earlier ones; one tiny saved model for each released version stays in
# tests/formats/ so that this promise is tested and not only made.
FORMAT_VERSION = 1
READ_BY = {1: "0.1"}
"""First release that reads a format version; grows by one line with each version."""

DTYPES = ("float32", "bfloat16", "float16")
STRUCTURE_KINDS = ("transformers", "import", "pickle", "graph")


@dataclass(frozen=True)
class ModelSpec:
    """Facts about one saved model that everything else is derived from.

    Attributes:
        task: Name in ``mlflow_safeflavor.tasks.TASKS``.
        dtype: Serving dtype of the floating point weights; one of ``DTYPES``.
        structure: How the module is rebuilt; one of ``STRUCTURE_KINDS``.
        model_class: ``module:qualname`` of the module's class.
        task_config: What the task recorded at save (pooling, labels, padding, …); JSON only.
        input_columns: Field of the task → column name in the user's rows.
        model_config: Run-time options with their stored defaults.
        loader_version: Release of this package that wrote the artifact.
        loader_digest: SHA-256 over the vendored loader's source.
        runs: What of its own the artifact runs when loaded: "code", "pickle"; the caller must agree.
        format_version: See ``FORMAT_VERSION``.
    """

    task: str
    dtype: str
    structure: str
    model_class: str
    loader_version: str
    loader_digest: str
    runs: tuple[str, ...] = ()
    task_config: Mapping[str, Any] = field(default_factory=dict)
    input_columns: Mapping[str, str] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("task_config", "input_columns", "model_config"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "runs", tuple(self.runs))

    def to_flavor(self) -> dict[str, Any]:
        """The JSON-able entry written to ``MLmodel``; ``from_flavor`` reads it back."""
        entry = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        entry["runs"] = list(self.runs)
        return {name: dict(value) if isinstance(value, MappingProxyType) else value for name, value in entry.items()}

    @classmethod
    def from_flavor(cls, entry: Mapping[str, Any]) -> ModelSpec:
        """Read the entry of ``MLmodel``.

        Raises:
            FormatVersionError: A newer release wrote it.
            IntegrityError: A key is missing or of the wrong type.
        """
        if not isinstance(entry, Mapping):
            raise IntegrityError(
                "The safeflavor entry of MLmodel is malformed", where="MLmodel", wanted="a mapping", found=repr(entry)
            )
        version = entry.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise IntegrityError(
                "MLmodel has no usable format_version", where="MLmodel", wanted="a whole number", found=repr(version)
            )
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                "The model was saved in a format that this release does not read",
                where="MLmodel",
                wanted=f"format_version {FORMAT_VERSION} or older",
                found=f"format_version {version}, written by mlflow-safeflavor {entry.get('loader_version')}",
                way_out=f"install mlflow-safeflavor {entry.get('loader_version')} or newer",
            )
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        for name in types.keys() - entry.keys():
            raise IntegrityError(
                "The safeflavor entry of MLmodel is incomplete", where="MLmodel", wanted=name, found="no such key"
            )
        for name, type_name in types.items():
            expected: type = {"str": str, "int": int, "tuple[str, ...]": list}.get(str(type_name), Mapping)
            if not isinstance(entry[name], expected):
                raise IntegrityError(
                    "A key of the safeflavor entry of MLmodel has the wrong type",
                    where=f"MLmodel, {name}",
                    wanted=expected.__name__,
                    found=type(entry[name]).__name__,
                )
        if not all(isinstance(kind, str) for kind in entry["runs"]):
            raise IntegrityError(
                "A key of the safeflavor entry of MLmodel has the wrong type", where="MLmodel, runs", wanted="strings"
            )
        for name, allowed in (("dtype", DTYPES), ("structure", STRUCTURE_KINDS)):
            if entry[name] not in allowed:
                raise IntegrityError(
                    f"Unknown {name} in MLmodel",
                    where=f"MLmodel, {name}",
                    wanted=list(allowed),
                    found=repr(entry[name]),
                )
        return cls(**{name: entry[name] for name in types})
