"""Named tensors of a checkpoint: of a folder, shards, a file or a state dict."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.errors import IntegrityError, StructureError, TrustError, WeightsError
from mlflow_safeflavor.module.slots import some

__all__ = ["read_state"]

# Files of a folder's weights, the preferred first.
_IN_FOLDERS = (
    *("model.safetensors.index.json", "model.safetensors"),
    *("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def read_state(source: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Key → tensor on the CPU, of a folder, an index of shards, a file or a state dict.

    Safetensors are memory-mapped. Other files are read with ``torch.load(weights_only=True)``,
    which runs nothing.

    Raises:
        StructureError: There are no weights at this place.
        IntegrityError: A file is damaged, or a shard is missing.
        TrustError: A file holds more than tensors.
        WeightsError: A value is no tensor, or has no memory.
    """
    # Within a user's `with torch.device("meta")` readers would allocate there, and read nothing.
    with torch.device("cpu"):
        state = dict(source) if isinstance(source, Mapping) else _read_path(Path(source))
    # Checkpoints of training hold epochs and optimizers beside the state dict.
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise WeightsError(
                "The checkpoint holds something else than tensors with values",
                where=key,
                found="a tensor on the meta device"
                if isinstance(value, torch.Tensor)
                else type(value).__name__,
                hint="hand the state dict itself to mlflow_safeflavor.materialize, like "
                "torch.load(file, weights_only=True)['state_dict']",
            )
    return state


def _read_path(path: Path) -> dict[str, Any]:
    file = _find_weights(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if not file.is_file():
        raise StructureError(
            "There is no such checkpoint", where=path, wanted="a file or folder with weights"
        )
    # By its ending: torch.load of safetensors fails with a message about pickles.
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)


def _find_weights(folder: Path) -> Path:
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir() if file.is_file())
    adapter = "adapter_config.json" in found
    raise StructureError(
        "The folder holds no model weights",
        where=folder,
        wanted=" | ".join(_IN_FOLDERS),
        found=f"a PEFT adapter: {some(found)}" if adapter else some(found) or "an empty folder",
        hint="load the base model with peft, merge_and_unload() and save that"
        if adapter
        else "mlflow_safeflavor.materialize(module, FILE) takes a file of any name",
    )


_HINT = "fetch the checkpoint again, or save it again where it comes from"


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        weight_map = dict(parse_json(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        plain = all(os.path.basename(name) == name for name in names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            "The index of shards is malformed", where=index, found=error, hint=_HINT
        ) from None
    # An index is a stranger's: "../other" would be read as if it were of this checkpoint.
    if not plain:
        raise IntegrityError(
            "The index of shards points outside its folder",
            where=index,
            found=some(names),
            hint=_HINT,
        )
    state: dict[str, Any] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise IntegrityError(
                "A shard of the checkpoint is missing", where=index.parent / name, hint=_HINT
            )
        state.update(_read_path(index.parent / name))
    # A shard of another save of the same model has the right name and other tensors.
    if odd := sorted(weight_map.keys() ^ state.keys()):
        raise IntegrityError(
            "The shards do not hold what their index lists",
            where=index,
            found=some(odd),
            hint=_HINT,
        )
    return state


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        # Mapped: a tensor takes memory when it is read, and a dropped one never.
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()  # of no dict: it cannot be iterated
            return {key: opened.get_tensor(key) for key in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            "A safetensors file cannot be read", where=file, found=error, hint=_HINT
        ) from None


def _read_torch(file: Path) -> dict[str, Any]:
    # weights_only: a plain torch.load runs any code that the file names.
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrustError(
            "The file holds more than tensors, and nothing of it was run",
            where=file,
            wanted="a state dict",
            found=str(error).strip().splitlines()[0],
            hint="torch.save(model.state_dict(), …) where the model comes from, or better: "
            "safetensors",
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise IntegrityError(
            "A checkpoint file cannot be read", where=file, found=error, hint=_HINT
        ) from None
    if not isinstance(content, Mapping):
        raise WeightsError(
            "The file holds no state dict",
            where=file,
            wanted="a dict of tensors",
            found=type(content).__name__,
        )
    return dict(content)
