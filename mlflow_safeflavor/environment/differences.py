"""Differences between the recorded environment and this one: found, worded, and acted on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from mlflow_safeflavor.environment.installed import (
    MISSING,
    TORCH_FAMILY,
    find_installed,
    installed_version,
    listed_versions,
)
from mlflow_safeflavor.environment.recorded import PLATFORM_KEYS, Environment, platform_facts
from mlflow_safeflavor.environment.wheels import installed_content
from mlflow_safeflavor.errors import (
    EnvironmentMismatchError,
    ParityError,
    StructureError,
    WeightsError,
)

__all__ = [
    "POLICIES",
    "Difference",
    "find_differences",
    "format_differences",
    "naming_missing",
    "naming_versions",
    "require_same",
]

_logger = logging.getLogger("mlflow.safeflavor")

# Reactions of ``require_same``.
POLICIES = ("ignore", "warn", "error")

# Facts of torch's build that no installation changes: named, so that other last bits have a reason.
_HARDWARE = frozenset({"cpu_capability", "threads"})

_HINT = (
    "install requirements.txt of the model (`pip install -r requirements.txt`) under the Python of "
    "its python_env.yaml, or let MLflow do both with --env-manager uv"
)


@dataclass(frozen=True)
class Difference:
    """One fact that is not as it was at save.

    Attributes:
        kind: ``python`` (another minor version), ``python-patch``, ``implementation``, ``system``,
            ``machine``, ``libc``, ``distribution``, ``missing``, ``wheel`` (same version, other
            content than the wheel it came from), ``torch-build`` (same torch release, other build)
            or ``hardware`` (CPU capability and threads, which no installation can change).
        name: The distribution or fact.
        wanted: The recorded value.
        found: The value now.
    """

    kind: str
    name: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: wanted {self.wanted}, found {self.found}"


def find_differences(
    recorded: Environment,
    *,
    torch_build: Mapping[str, Any] | None = None,
    path: Sequence[str] | None = None,
) -> list[Difference]:
    """Compare this interpreter and its distributions with the recorded ones; imports none of them.

    Args:
        recorded: From environment.json.
        torch_build: The same facts as at save, where torch is imported already.
        path: Folders to search instead of ``sys.path``.
    """
    return [
        *_platform_differences(recorded),
        *_distribution_differences(recorded.distributions, path),
        *_wheel_differences(recorded, path),
        *_build_differences(recorded.torch_build, torch_build or {}),
    ]


def _platform_differences(recorded: Environment) -> Iterator[Difference]:
    facts = platform_facts()
    for name in PLATFORM_KEYS:
        wanted, found = getattr(recorded, name), facts[name]
        # Its family counts, not its version: that is the base image's choice, and the golden rows
        # prove more than it could.
        if name == "libc":
            wanted, found = wanted.partition(" ")[0], found.partition(" ")[0]
        if wanted != found:
            is_patch = name == "python" and wanted.split(".")[:2] == found.split(".")[:2]
            yield Difference(
                "python-patch" if is_patch else name, name, wanted or "unknown", found or "unknown"
            )


def _distribution_differences(
    pins: Mapping[str, str], path: Sequence[str] | None
) -> Iterator[Difference]:
    listed = listed_versions(sys.path if path is None else path)
    for name, wanted in pins.items():
        if _same_version(wanted, listed.get(name)):
            continue
        # Slow, and so asked only where the name of a dist-info folder did not settle it: other
        # formats, zip files, finders.
        found = installed_version(name, path)
        if found is None:
            yield Difference("missing", name, wanted, MISSING)
        elif not _same_version(wanted, found):
            # 2.13.0+cpu for 2.13.0+cu130: the same release, so another kind of difference.
            is_build = name in TORCH_FAMILY and wanted.partition("+")[0] == found.partition("+")[0]
            yield Difference("torch-build" if is_build else "distribution", name, wanted, found)


def _wheel_differences(recorded: Environment, path: Sequence[str] | None) -> Iterator[Difference]:
    """Distributions of the right version from another wheel: an index's in place of a folder's."""
    for name, wheel in recorded.wheels.items():
        one = find_installed(name, path)
        content = None if one is None else installed_content(one.distribution)
        if (
            one
            and content
            and content != wheel["content"]
            and _same_version(recorded.distributions[name], one.version)
        ):
            yield Difference(
                "wheel", name, f"the build of {wheel['file']}", f"another build of {one.version}"
            )


def _build_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Difference]:
    # Where torch is not imported nothing was found, and nothing differs: load compares before.
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key] != found[key]:
            kind = "hardware" if key in _HARDWARE else "torch-build"
            yield Difference(kind, f"torch {key}", str(wanted[key]), str(found[key]))


def _same_version(wanted: str, found: str | None) -> bool:
    try:
        return wanted == found or (found is not None and Version(wanted) == Version(found))
    except InvalidVersion:
        return False


def format_differences(differences: Sequence[Difference]) -> str:
    """Table of differences with one hint; empty without any."""
    return f"{_table(differences)}\n  hint: {_HINT}" if differences else ""


@contextmanager
def naming_versions(recorded: Environment, *, path: Sequence[str] | None = None) -> Iterator[None]:
    """Begin the hint of a load that fails inside with the pins, where other versions are installed.

    Raises:
        SafeFlavorError: The error raised inside.
    """
    try:
        yield
    # These say that something came out otherwise; other versions are then the likely cause. The
    # other kinds name a cause of their own.
    except (ParityError, StructureError, WeightsError) as error:
        found = [
            str(one) for one in find_differences(recorded, path=path) if one.kind in _INSTALLABLE
        ]
        if not found:
            raise
        versions = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
        hint = f"{_HINT} ({versions})" + (f"; or {error.hint}" if error.hint else "")
        # From its own cause, not from itself: a reader sees one error, with the better hint.
        raise error.with_hint(hint).with_traceback(error.__traceback__) from error.__cause__


@contextmanager
def naming_missing() -> Iterator[None]:
    """Name the missing distribution where the module is loaded with the pins of the graph alone.

    Raises:
        EnvironmentMismatchError: Something that is not installed was imported inside.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentMismatchError(
            "The graph cannot answer this, and what its module needs is not installed",
            where=error.name or str(error),
            found=MISSING,
            hint="install requirements.txt of the model, and not only requirements-onnx.txt; an "
            "image of `mlflow-safeflavor dockerfile --engine module` has it all",
        ) from error


# Kinds of differences that installing something else removes.
_INSTALLABLE = frozenset(
    ("python", "implementation", "distribution", "missing", "wheel", "torch-build")
)


def _table(differences: Sequence[Difference]) -> str:
    names, wanted = (max(len(getattr(d, part)) for d in differences) for part in ("name", "wanted"))
    rows = [
        f"  {d.name:<{names}}  wanted {d.wanted:<{wanted}}  found {d.found}" for d in differences
    ]
    count = "1 difference" if len(rows) == 1 else f"{len(rows)} differences"
    return "\n".join([f"This is not the environment that the model was saved in ({count})", *rows])


def require_same(
    recorded: Environment, *, policy: str, path: Sequence[str] | None = None
) -> list[Difference]:
    """Act on differences as the policy says.

    Args:
        recorded: From environment.json.
        policy: ``"ignore"`` compares nothing, ``"warn"`` logs the table, ``"error"`` raises it.
        path: Folders to search instead of ``sys.path``.

    Returns:
        The differences.

    Raises:
        EnvironmentMismatchError: Something differs under ``"error"``, or there is no such policy.
    """
    if policy not in POLICIES:
        raise EnvironmentMismatchError(
            "Unknown policy for a differing environment",
            where="environment",
            wanted=list(POLICIES),
            found=repr(policy),
        )
    differences = [] if policy == "ignore" else find_differences(recorded, path=path)
    if differences and policy == "error":
        raise EnvironmentMismatchError(
            _table(differences), hint=f'{_HINT}; or accept the differences with environment="warn"'
        )
    if differences:
        _logger.warning("%s", format_differences(differences))
    return differences
