"""The local folder of a checkpoint, downloaded if it is the hub's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_safeflavor.checkpoints import hub
from mlflow_safeflavor.checkpoints.other_formats import (
    require_torch_weights,
    require_torch_weights_among,
)
from mlflow_safeflavor.errors import StructureError

__all__ = ["folder_of", "own_folders"]

_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
_HUB_FILES = ("*.json", "*.safetensors")  # no code: trust_remote_code is refused


def folder_of(name_or_path: str | Path, revision: str | None, kwargs: dict[str, Any]) -> Path:
    """The local folder of a checkpoint; takes the hub's options out of ``kwargs``."""
    options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    require_torch_weights(name_or_path)
    # A folder goes before a repository of the same name, as in transformers.
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not hub.is_hub_id(name_or_path):
        raise StructureError(
            "There is no such checkpoint", where=name_or_path, wanted="a folder, or a hub id"
        )
    if not hub.is_commit(revision):
        raise StructureError(
            "There is no such folder, and a hub repository needs a pinned revision, as its "
            "branches and tags move",
            where=name_or_path,
            wanted="revision= a commit hash, 40 hexadecimal digits",
            found=repr(revision),
            hint=f"take it from huggingface_hub.model_info({str(name_or_path)!r}).sha, or from the "
            "commit list of the repository",
        )
    return _download(str(name_or_path), str(revision), options)


def _download(name: str, revision: str, options: Mapping[str, Any]) -> Path:
    folder = hub.download(name, revision, _HUB_FILES, **options)
    if any(folder.glob("*.safetensors")):
        return folder
    # Pickled weights only where there are no others: many repositories hold both.
    folder = hub.download(name, revision, ["*.json", "*.bin"], **options)
    if not any(folder.glob("*.bin")) and not options.get("local_files_only"):
        require_torch_weights_among([file.name for file in hub.list_files(name, revision)[1]], name)
    return folder


def own_folders(folder: str | Path) -> list[Path]:
    """Folders that may be read of a checkpoint: its own, and the hub cache's behind its links."""
    # A snapshot in the hub's cache is a folder of links to ../../blobs.
    folder = Path(os.path.abspath(folder))
    return [
        folder,
        *(above.parent / "blobs" for above in folder.parents if above.name == "snapshots"),
    ]
