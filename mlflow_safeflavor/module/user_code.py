"""The user's own classes and functions, by name: from packages or the artifact's ``code/``."""

from __future__ import annotations

import hashlib
import importlib
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN, digest_of_file
from mlflow_safeflavor.environment.installed import OWN_NAME
from mlflow_safeflavor.environment.owners import Owners
from mlflow_safeflavor.errors import IntegrityError, StructureError

if TYPE_CHECKING:
    import torch

__all__ = ["distributions_of", "import_name", "importable_name", "make_importable", "name_of"]


def name_of(thing: Any) -> str:
    """``module:qualname`` of a class or function."""
    return f"{thing.__module__}:{thing.__qualname__}"


def importable_name(function: Callable[..., Any]) -> str | None:
    """``module:qualname`` of a function, or None where importing the name gives another.

    So it is for lambdas, closures, functions of scripts, methods of an object, and functions that
    were wrapped.
    """
    module, qualname = (
        getattr(function, "__module__", None),
        getattr(function, "__qualname__", "<none>"),
    )
    if module in (None, "__main__") or "<" in qualname:
        return None
    name = f"{module}:{qualname}"
    try:
        # Equal, not identical: a class method is a new object each time.
        return name if import_name(name) == function else None
    except StructureError:
        return None


def distributions_of(
    module: torch.nn.Module, hooks: Mapping[str, Callable[..., Any]], *, except_for: Collection[str]
) -> list[str]:
    """Installed distributions that define the classes in ``module`` and the hooks.

    Args:
        module: Its submodules are looked at, too.
        hooks: The user's functions.
        except_for: Top-level names that are stored with the model.
    """
    names = {type(child).__module__ for child in module.modules()}
    names |= {getattr(hook, "__module__", None) or "" for hook in hooks.values()}
    ours = {*except_for, "", "__main__", "mlflow_safeflavor", "torch", "transformers"}
    files = {
        getattr(sys.modules.get(name), "__file__", None)
        for name in names
        if name.partition(".")[0] not in ours
    }
    # Looking up who owns a file reads every distribution's list, so only where there is one in
    # question.
    owners = Owners() if files - {None} else None
    found = {owner for file in files if file and owners and (owner := owners.of(file))}
    return sorted(found - {OWN_NAME})  # of what it requires, a model gets what that model needs


def make_importable(layout: Layout) -> None:
    """Put an artifact's code folder first on ``sys.path``, as MLflow does.

    Modules imported later, too, are the files that were compared with the manifest, or an error.

    Raises:
        StructureError: A module of the same name but other content is imported already, so that the
            artifact's own would be shadowed.
    """
    if layout.code.is_dir():
        with _import_state:
            _sealed.update(
                {
                    str((layout.root / name).absolute()): digest
                    for name, digest in layout.sealed.items()
                }
            )
            _make_importable(layout.code.absolute())


# Held while ``sys.path`` and Python's caches of it change: invalidating these in two threads at
# once is a KeyError.
_import_state = threading.Lock()


def _make_importable(code: Path) -> None:
    for file in sorted(code.rglob("*.py")):
        name = ".".join(file.relative_to(code).with_suffix("").parts).removesuffix(".__init__")
        if name.partition(".")[0] != "mlflow_safeflavor":
            _require_same_module(sys.modules.get(name), name, file)
    if str(code) not in _read_from_source:
        _read_from_source.add(str(code))
        sys.path_hooks.insert(0, _source_finder(code))
        # Finders that Python made for these folders before, which read byte code. A list first,
        # since other threads import meanwhile.
        for path in [
            path for path in list(sys.path_importer_cache) if Path(path).is_relative_to(code)
        ]:
            sys.path_importer_cache.pop(path, None)
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    importlib.invalidate_caches()


_read_from_source: set[str] = set()
# Path → SHA-256 of sources, as they were when they were last compared with a manifest.
_sealed: dict[str, str] = {}


class _SourceLoader(SourceFileLoader):
    """Loads sources as they were compared with a manifest, and no byte code."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        # Python then neither reads nor writes ``__pycache__``, which no manifest lists: it would
        # run byte code there in place of the source that was checked.
        raise OSError

    def get_data(self, path: str) -> bytes:
        content = super().get_data(path)  # compared and run from the same bytes, read once
        digest = hashlib.sha256(content).hexdigest()
        if digest != _sealed.get(path, digest):
            raise IntegrityError(
                "A model's own code was changed after the model was loaded",
                where=path,
                hint=FETCH_AGAIN,
            )
        return content


def _source_finder(code: Path) -> Callable[[str], FileFinder]:
    def find(path: str) -> FileFinder:
        if not Path(path).is_relative_to(code):
            raise ImportError(path)
        return FileFinder(
            path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_SourceLoader, SOURCE_SUFFIXES)
        )

    return find


def _require_same_module(imported: ModuleType | None, name: str, file: Path) -> None:
    origin = getattr(imported, "__file__", None)
    if imported is None or (
        origin and Path(origin).is_file() and digest_of_file(Path(origin)) == digest_of_file(file)
    ):
        return
    raise StructureError(
        "Another module of the same name is imported already",
        where=name,
        wanted=file,
        found=origin or "a module without a file",
        hint="load models whose code differs under the same module name in separate processes",
    )


def import_name(full_name: str) -> Any:
    """The class or function that ``module:qualname`` names.

    Raises:
        StructureError: It cannot be imported.
    """
    module_name, _, qualname = full_name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # code of others fails in its own ways
        raise StructureError(
            "The model's own code cannot be imported",
            where=full_name,
            found=f"{type(error).__name__}: {error}",
            hint="when saving, pass code_paths=[…] with the file or package that defines it",
        ) from error
    return found
