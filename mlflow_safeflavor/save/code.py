"""Code in an artifact: the loader, which is this package without four rooms, and the user's."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlflow.utils.model_utils import _validate_and_copy_code_paths

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import digest_of_file
from mlflow_safeflavor.errors import InputError

__all__ = ["LOADER_MODULE", "loader_digest", "write_code"]

# Written into every saved model, so it can never move.
LOADER_MODULE = "mlflow_safeflavor"

_PACKAGE = Path(__file__).parents[1]
# Rooms that no load and no prediction runs: a sixth of the package, which each model would carry.
_LEFT_OUT = ("checkpoints", "cli.py", "save", "spark.py", "spark_daemon.py", "verify")
_NOTE = "LOADER.txt"


def write_code(code_paths: Sequence[str | Path] | None, layout: Layout) -> None:
    """Write the loader and the user's code below ``code/``."""
    # MLflow's own copier, so that a path means here what it means in its other flavors.
    paths = [os.fspath(path) for path in code_paths or ()]
    _validate_and_copy_code_paths(paths, layout.root)  # type: ignore[no-untyped-call]
    target = layout.code / LOADER_MODULE
    # The loader's files would be written among those of another release.
    if target.exists():
        raise InputError(
            "code_paths must not hold the loader itself", where=LOADER_MODULE, hint="leave it out"
        )
    for file in _loader_files():
        copy = target / file.relative_to(_PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (target / _NOTE).write_text(
        "The part of mlflow-safeflavor that loads this model and answers. Not here: "
        f"{', '.join(_LEFT_OUT)}.\n"
    )


def loader_digest() -> str:
    """SHA-256 over the names and contents of the loader's files."""
    digest = hashlib.sha256()
    for file in _loader_files():
        digest.update(
            file.relative_to(_PACKAGE).as_posix().encode() + digest_of_file(file).encode()
        )
    return digest.hexdigest()


def _loader_files() -> Iterator[Path]:
    for file in sorted(_PACKAGE.rglob("*.*")):
        inside = file.relative_to(_PACKAGE)
        if inside.parts[0] not in _LEFT_OUT and (
            file.suffix in (".py", ".txt") or file.name == "py.typed"
        ):
            yield file
