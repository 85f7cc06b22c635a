"""Checkpoints of other runtimes, and what to do instead: they hold no weights for a module."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path

from mlflow_safeflavor.errors import StructureError

__all__ = ["require_torch_weights", "require_torch_weights_among"]

_OF_TORCH = (".safetensors", ".bin")


def require_torch_weights(path: str | Path) -> None:
    """Refuse a local file of another runtime, and a folder with nothing but such files.

    Raises:
        StructureError: Says what to do instead.
    """
    path = Path(path)
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("onnx/*")]
    require_torch_weights_among([file.name for file in files], path)
    if any(file.suffix in _OF_TORCH for file in files):
        return
    for file in files:
        if file.suffix in (".pt", ".pth", ".ts", ".torchscript") and _is_torchscript(file):
            raise StructureError(
                "TorchScript keeps no class that could be called again",
                where=path,
                wanted="the module that was scripted or traced",
                found=file.name,
                hint="make the module, and copy the weights into it: module.load_state_dict("
                f"torch.jit.load({str(file)!r}, map_location='cpu').state_dict())",
            )


def require_torch_weights_among(names: Collection[str], where: object) -> None:
    """The same for names of files, such as those of a repository; TorchScript is not told by it."""
    # Many repositories hold other formats beside weights that a module can take.
    if any(name.endswith(_OF_TORCH) for name in names):
        return
    if gguf := next((name for name in sorted(names) if name.endswith(".gguf")), None):
        raise StructureError(
            "A GGUF file holds weights that were packed for llama.cpp",
            where=where,
            wanted="model.safetensors, and config.json beside it",
            found=gguf,
            hint="take the checkpoint that it was converted from, which its model card calls "
            "base_model",
        )
    if onnx := next((name for name in sorted(names) if name.endswith(".onnx")), None):
        raise StructureError(
            "An ONNX file holds a graph, and no module that could be rebuilt and compared",
            where=where,
            wanted="model.safetensors, and config.json beside it",
            found=onnx,
            hint="save the module or checkpoint that it was exported from: its graph is recorded "
            "and proven then; the file alone is for mlflow.onnx",
        )


def _is_torchscript(file: Path) -> bool:
    """Whether ``torch.jit.save`` wrote it: a ZIP with code beside its tensors."""
    if not zipfile.is_zipfile(file):
        return False
    # By its list of names: to load it, torch.jit.load would run code of the file.
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())
