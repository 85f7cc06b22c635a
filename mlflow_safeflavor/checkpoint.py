"""Checkpoints on disk → modules that are right, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.inventory import find_meta, find_slots
from mlflow_safeflavor.placement import resolve_dtype
from mlflow_safeflavor.structure import build, describe

__all__ = ["from_pretrained", "require_constructed", "tokenizer_of"]


def from_pretrained(
    name_or_path: str | Path,
    *,
    model_class: type[Any] | None = None,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    **kwargs: Any,
) -> torch.nn.Module:
    """A checkpoint as a module whose every tensor came from the checkpoint or from the constructor.

    transformers' own loader does the reading; what it reports as missing, unexpected or mismatched,
    and what it leaves without memory, is an error here and not a log line.

    Args:
        name_or_path: A local folder, or the id of a hub repository.
        model_class: Class to build; by default the one that the checkpoint's config names.
        dtype: "float32", "bfloat16" or "float16"; never "auto".
        revision: Commit of a hub repository.
        kwargs: Handed to ``model_class.from_pretrained``.

    Returns:
        The module on the CPU, in eval mode.

    Raises:
        StructureError: The folder or its class cannot be found.
        WeightsError: The checkpoint and the class do not fit each other.
    """
    wanted = resolve_dtype(dtype)
    cls = model_class or _class_of(name_or_path, revision)
    try:
        module, info = cls.from_pretrained(
            name_or_path, dtype=wanted, revision=revision or "main", output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise StructureError("The checkpoint cannot be read", where=name_or_path, found=error) from error
    problems = [
        f"{kind} {key}" for kind, keys in info.items() if kind != "error_msgs" for key in sorted(map(str, keys))
    ]
    problems += [f"on meta: {path}" for path in find_meta(find_slots(module))]
    if problems or info.get("error_msgs"):
        raise WeightsError(
            f"The checkpoint does not fit {cls.__name__}",
            where=name_or_path,
            found="; ".join([*problems[:5], *map(str, info.get("error_msgs") or ())]),
            way_out="choose the class that the checkpoint was saved from (model_class=…)",
        )
    loaded: torch.nn.Module = module.eval()
    require_constructed(loaded)
    return loaded


def _class_of(name_or_path: str | Path, revision: str | None) -> type[Any]:
    """The transformers class that a checkpoint's config names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise StructureError(
            "There is no readable checkpoint", where=name_or_path, wanted="a folder with config.json", found=error
        ) from error
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type):
        raise StructureError(
            "The checkpoint's class is not in the installed transformers",
            where=name_or_path,
            found=name,
            way_out="say which class to build: model_class=…",
        )
    return cls


def require_constructed(module: torch.nn.Module) -> None:
    """Compare what no checkpoint holds with what the constructor computes on real memory.

    transformers builds modules on the meta device and afterwards gives non-persistent buffers memory
    that only the class's ``_init_weights`` can fill again; one that it forgets holds garbage.

    Raises:
        WeightsError: A non-persistent buffer or plain tensor differs.
    """
    slots = [slot for slot in find_slots(module) if not slot.persistent]
    if not slots:
        return
    built = build(describe(module), dtype=_float_dtype(module))
    constructed = {slot.path: slot.tensor for slot in find_slots(built)}
    for slot in slots:
        expected = constructed[slot.path]
        if not torch.equal(slot.tensor.cpu(), expected.to(slot.tensor.dtype)):
            raise WeightsError(
                f"A {slot.kind} that no checkpoint holds was not computed by the loader",
                where=slot.path,
                wanted="the values its constructor computes",
                found="other values, probably memory that nobody wrote",
                way_out="build the module with its constructor and load its state dict, then save that",
            )


def _float_dtype(module: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a local checkpoint folder.

    Raises:
        StructureError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise StructureError(
            "The checkpoint has no readable tokenizer", where=folder, found=error, way_out="pass tokenizer=…"
        ) from error
