"""Distributions that are installed, read from their metadata alone."""

from __future__ import annotations

import email.parser
import functools
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

__all__ = [
    "MISSING",
    "OWN_NAME",
    "TORCH_FAMILY",
    "Installed",
    "find_installed",
    "installed_distributions",
    "installed_version",
    "listed_versions",
    "source_tree",
]

# Vendored in every artifact, and so never pinned.
OWN_NAME = canonicalize_name("mlflow-safeflavor")

# Released in several builds, told apart by a local label (``+cpu``).
TORCH_FAMILY = frozenset({"torch", "torchaudio", "torchvision"})

MISSING = "not installed"


def _search(
    path: Sequence[str] | None, **context: str
) -> Iterator[importlib.metadata.Distribution]:
    where: dict[str, Any] = dict(context) if path is None else {**context, "path": list(path)}
    yield from importlib.metadata.distributions(**where)


@dataclass(frozen=True)
class Installed:
    """Name, version and requirements of a distribution, and its own object for the rest."""

    name: str
    version: str
    requires: tuple[str, ...]
    distribution: importlib.metadata.Distribution


def installed_distributions(path: Sequence[str] | None) -> dict[str, Installed]:
    """Canonical name → distribution; the first on the path wins, as it does for imports."""
    found: dict[str, Installed] = {}
    for one in filter(None, map(_read, _search(path))):
        found.setdefault(canonicalize_name(one.name), one)
    return found


def find_installed(name: str, path: Sequence[str] | None) -> Installed | None:
    """The installed distribution of this name, the first on the path; None if there is none."""
    return next(filter(None, map(_read, _search(path, name=name))), None)


def installed_version(name: str, path: Sequence[str] | None) -> str | None:
    """The installed version of this name; None if there is none."""
    found = find_installed(name, path)
    return None if found is None else found.version


def _read(distribution: importlib.metadata.Distribution) -> Installed | None:
    """Name, version and requirements; None for the leftovers of a broken uninstall."""
    text = distribution.read_text("METADATA")
    if text is not None:
        # After the blank line comes a description of many pages.
        names, versions, requires = _parse(text.partition("\n\n")[0])
    else:
        try:
            metadata = distribution.metadata
        # The backport importlib_metadata, whose finder MLflow puts on sys.meta_path, raises it; the
        # standard library gives empty metadata.
        except FileNotFoundError:
            return None
        names, versions, requires = (
            metadata.get_all("Name"),
            metadata.get_all("Version"),
            distribution.requires,
        )
    if not (names and versions and names[0] and versions[0]):
        return None
    return Installed(names[0], versions[0], tuple(requires or ()), distribution)


# Keyed by the text itself, so never stale. importlib parses anew at each access, which took seconds
# a save.
@functools.cache
def _parse(headers: str) -> tuple[list[str] | None, list[str] | None, list[str] | None]:
    parsed = email.parser.HeaderParser().parsestr(headers)
    return parsed.get_all("Name"), parsed.get_all("Version"), parsed.get_all("Requires-Dist")


def source_tree(distribution: importlib.metadata.Distribution) -> str | None:
    """The folder of an old-style editable install: an egg-info beside its setup.py."""
    if distribution.read_text("METADATA") is not None:
        return None
    folder = Path(str(distribution.locate_file("")))
    is_source = any(
        (folder / name).is_file() for name in ("setup.py", "setup.cfg", "pyproject.toml")
    )
    return str(folder) if is_source else None


def listed_versions(path: Iterable[str]) -> dict[str, str]:
    """Canonical name → version, from the names of dist-info folders alone."""
    # A hundred times faster than reading metadata, and each load asks.
    found: dict[str, str] = {}
    for folder in path:
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            # A folder without METADATA is the leftover of a broken uninstall, and no installation.
            if entry.endswith(".dist-info") and os.path.isfile(
                os.path.join(folder, entry, "METADATA")
            ):
                name, _, version = entry.removesuffix(".dist-info").rpartition("-")
                found.setdefault(canonicalize_name(name), version)
    return found
