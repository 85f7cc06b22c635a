"""A folder that becomes visible at once, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_safeflavor.artifact.scratch import scratch_folder
from mlflow_safeflavor.errors import IntegrityError

__all__ = ["staging"]


@contextmanager
def staging(target: str | Path, *, umask: int | None = None) -> Iterator[Path]:
    """A folder beside ``target`` that becomes ``target`` in one rename, or vanishes on any error.

    An empty folder at ``target`` is replaced: MLflow hands one over in ``log_model``.

    Args:
        target: Folder to create.
        umask: Decides on the modes of all files; by default this process's own.

    Raises:
        IntegrityError: ``target`` exists and is not an empty folder.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise IntegrityError(
            "The target path exists already",
            where=target,
            wanted="a path that does not exist, or an empty folder",
            hint="choose another path or remove it first",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename within one file system is all or nothing.
    with scratch_folder("staging", target.parent, stem=f".{target.name}") as stage:
        yield stage
        # The folder is made private (0700), and safetensors' files are (0600); a model has the
        # modes that any new folder and file would have.
        _set_modes(stage, _own_umask() if umask is None else umask)
        os.replace(stage, target)


def _own_umask() -> int:
    # There is no other way to ask: for an instant other threads make files that all may write.
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _set_modes(root: Path, umask: int) -> None:
    """Give a folder and all below it the modes of new ones; what is executable stays so."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            executable = 0o111 if path.is_dir() else path.stat().st_mode & 0o111
            path.chmod((0o666 | executable) & ~umask)
