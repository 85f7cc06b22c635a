"""Distributions that a rehearsal used, their users, and files that no distribution brings."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mlflow_safeflavor.environment.installed import OWN_NAME, installed_distributions
from mlflow_safeflavor.environment.owners import Owners, is_code, site_folders
from mlflow_safeflavor.errors import EnvironmentMismatchError

__all__ = ["Opened", "Use", "find_used", "way_to_bring"]

# Engine → file that it was the first to open → module that wanted it.
Opened: TypeAlias = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Use:
    """One distribution that was imported or read.

    Attributes:
        version: Installed there.
        reader: The module that was the first to open a file of it.
        engine: The engine that was loading then.
    """

    version: str
    reader: str
    engine: str


def find_used(opened: Opened, path: Sequence[str]) -> dict[str, Use]:
    """Canonical name → use, of every distribution that a rehearsal imported or read.

    Args:
        opened: See ``Rehearsal.load``.
        path: The ``sys.path`` of that process.

    Raises:
        EnvironmentMismatchError: It used code or data that no distribution brings.
    """
    owners, installed = Owners(path), installed_distributions(path)
    used: dict[str, Use] = {}
    strangers: dict[str, str] = {}
    # The graph comes first among the engines, so that of a distribution both use it is the reader:
    # what has the module as its first reader is needed by that alone.
    for engine, files in opened.items():
        for file, reader in ((_source(file), reader) for file, reader in files.items()):
            if _is_pythons(file):
                continue
            if name := owners.of(file):
                used.setdefault(name, Use(installed[name].version, reader, engine))
            elif _is_strange(file, path):
                strangers.setdefault(file, reader)
    _refuse(strangers)
    # This package is vendored, and MLflow pinned in any case, whole or in its smaller part.
    for name in (OWN_NAME, "mlflow"):
        used.pop(name, None)
    return used


def _source(file: str) -> str:
    """The source of byte code in a cache."""
    folder, cache, name = file.rpartition(f"{os.sep}__pycache__{os.sep}")
    return os.path.join(folder, name.partition(".")[0] + ".py") if cache else file


# transformers and MLflow list the metadata of everything that is installed: reading it is no use.
_METADATA = re.compile(r"\.(dist|egg)-info([/\\]|$)|[/\\]EGG-INFO[/\\]|\.(pth|egg-link)$")


@functools.cache
def _standard_library() -> tuple[str, ...]:
    return tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))


def _is_pythons(file: str) -> bool:
    """Whether a file is Python's own, or metadata, which many libraries read of all they find."""
    # site-packages lies below the standard library's folder.
    own = file.startswith(_standard_library()) and "-packages" not in file
    return own or _METADATA.search(file) is not None


def _is_strange(file: str, path: Sequence[str]) -> bool:
    """Whether a file that no distribution has belongs to this environment, not to the system."""
    here, name = os.path.join(os.path.realpath(os.path.dirname(file)), ""), os.path.basename(file)
    environment = sys.prefix != sys.base_prefix and here.startswith(
        os.path.join(os.path.realpath(sys.prefix), "")
    )
    inside = here.startswith(site_folders(path)) or (environment and name != "pyvenv.cfg")
    # Code counts wherever it lies: a sys.path of PYTHONPATH is not in the container. Data of the
    # system (/etc, /usr/share) is.
    return (inside or file.endswith((".py", ".pyc"))) and os.path.isfile(file)


def _refuse(strangers: Mapping[str, str]) -> None:
    code = {
        root: f"{Path(root).stem} (for {reader})"
        for file, reader in strangers.items()
        if (root := _root(file))
    }
    if code:
        raise EnvironmentMismatchError(
            "Loading runs code that no installed distribution has, so no pin could bring it to "
            "another machine",
            where=", ".join(code.values()),
            wanted="modules of distributions, or of code_paths",
            found=", ".join(code),
            hint=f"{_pass(code)}; or build a distribution of it, and install that",
        )
    if strangers:
        raise EnvironmentMismatchError(
            "Loading reads files that no installed distribution has, so no pin could bring them "
            "to another machine",
            where=", ".join(
                f"{Path(file).name} (for {reader})" for file, reader in strangers.items()
            ),
            wanted="files of distributions, or of code_paths",
            found=", ".join(strangers),
            hint="put them into a package of yours, read them from there "
            "(`Path(__file__).with_name(…)`), and pass its folder with code_paths=[…]; or install "
            "a distribution that has them",
        )


def _root(file: str) -> str | None:
    """The entry of code_paths that brings a module: its file or its package's folder."""
    if not is_code(file):
        return None
    root = Path(file)
    while (root.parent / "__init__.py").is_file():
        root = root.parent
    return str(root)


def _pass(roots: Iterable[str]) -> str:
    return f"pass code_paths=[{', '.join(map(repr, roots))}], with what you pass there already"


def way_to_bring(module: str) -> str | None:
    """The hint for a module that a clean process did not find; None if this one has none either."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) if top else None
    except ValueError:  # a module made by hand, whose __spec__ is None
        return None
    paths = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    found = next((path for path in paths if path and os.path.exists(path)), None)
    if found is None:
        return None
    if owner := Owners().of(found):
        version = installed_distributions(None)[owner].version
        return (
            f"install {owner}=={version} into {sysconfig.get_path('purelib')}: {found} was found "
            "only because of PYTHONPATH, the user's site-packages or a changed sys.path"
        )
    return _pass([_root(found) or found])
