"""Checkpoints as modules all of whose tensors were written, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.checkpoints.fitted import fitted, matches
from mlflow_safeflavor.checkpoints.folder import folder_of, own_folders
from mlflow_safeflavor.checkpoints.recipe import class_of, recipe_for
from mlflow_safeflavor.checkpoints.state_dict import read_state
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.module.dtypes import announced_cast, count_dtypes, read_as, resolve_dtype
from mlflow_safeflavor.module.guarded import guarded

__all__ = ["from_pretrained", "read_checkpoint"]


@checked
def from_pretrained(
    name_or_path: str | Path,
    *,
    model_class: type[Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
    **kwargs: Any,
) -> torch.nn.Module:
    """Load a checkpoint as a module; every tensor is the checkpoint's or the constructor's.

    transformers' own loader builds modules on the meta device, and tensors that its code then
    forgets to fill are garbage. So it is not used: the constructor runs on real memory, and the
    checkpoint is copied into that, so that ties and views stay as the constructor made them.
    Tensors that no checkpoint holds (non-persistent buffers, plain tensor attributes) keep the
    constructor's values, provided that two constructions agree on them. Only a checkpoint whose
    keys transformers would rename or convert goes through its loader, and then for the converted
    tensors alone.

    Other threads may load at the same time, with this function or with transformers' own.

    Args:
        name_or_path: A local folder, or the id of a hub repository.
        model_class: Class to build, any ``transformers.PreTrainedModel``; by default the one that
            the checkpoint's config names.
        dtype: "float32", "bfloat16", "float16" or "float64"; or "as-is", the dtype of most of its
            values. Submodules that their class keeps in float32 stay there. By default float32, and
            a cast to it is logged.
        revision: Commit of a hub repository, 40 hexadecimal digits; needed for one.
        new: Patterns like "classifier.*" of tensors that may be fresh: missing in the checkpoint,
            of another shape there, or random in the constructor.
        drop: Patterns like "lm_head.*" of keys of the checkpoint to leave out.
        kwargs: Changes of the config and arguments of the constructor, as for transformers;
            ``token``, ``cache_dir`` and ``local_files_only`` for the hub.

    Returns:
        The module on the CPU, in eval mode, with memory of its own.

    Raises:
        StructureError: The checkpoint or its class cannot be found, or the constructor fails.
        IntegrityError: A file is damaged.
        WeightsError: The checkpoint and the class do not fit each other.
    """
    module, found = read_checkpoint(
        name_or_path,
        model_class=model_class,
        dtype=dtype,
        revision=revision,
        new=new,
        drop=drop,
        **kwargs,
    )
    # Here and not in read_checkpoint: saving a folder announces the cast once, itself.
    announced_cast(dtype, found, read_as(dtype, found))
    return module


def read_checkpoint(
    name_or_path: str | Path,
    *,
    model_class: type[Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
    **kwargs: Any,
) -> tuple[torch.nn.Module, dict[str, int]]:
    """The module that ``from_pretrained`` returns, and the stored dtypes; logs no cast."""
    read_as(dtype, {})  # refuses an unknown dtype before gigabytes are read
    _refuse_options(kwargs)
    folder = folder_of(name_or_path, revision, kwargs)
    cls = model_class or class_of(folder)
    # What a checkpoint has transformers do is a stranger's choice: no connection, no other file.
    # A class of the user's own may do as it likes.
    with (
        guarded(*own_folders(folder))
        if cls.__module__.startswith("transformers.")
        else nullcontext()
    ):
        recipe = recipe_for(cls, folder, kwargs)
        # Mapped, not read: a dropped key costs nothing.
        state = {key: value for key, value in read_state(folder).items() if not matches(key, drop)}
        found = count_dtypes(state.values())
        module = fitted(recipe, state, resolve_dtype(read_as(dtype, found)), new, folder)
        _restore_generation_config(module, folder)
    return module.eval(), found


# Options of transformers' loader that would be ignored, or taken for changes of the config.
_REFUSED = {
    **dict.fromkeys(
        ("dtype", "torch_dtype"), "say dtype='float32', 'bfloat16', 'float16', 'float64' or 'as-is'"
    ),
    **dict.fromkeys(
        ("low_cpu_mem_usage", "_fast_init"), "leave it out: nothing is ever on the meta device here"
    ),
    **dict.fromkeys(
        (
            "device_map",
            "max_memory",
            "offload_folder",
            "offload_state_dict",
            "offload_buffers",
            "tp_plan",
        ),
        "leave it out; the module comes on the CPU, and load_model(device=…) places a saved one",
    ),
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file"),
        "load the weights without quantisation",
    ),
    **dict.fromkeys(("ignore_mismatched_sizes",), "name what may be fresh: new=('classifier.*',)"),
    **dict.fromkeys(("state_dict",), "mlflow_safeflavor.materialize(module, state_dict)"),
    **dict.fromkeys(("output_loading_info",), "leave it out: what does not fit is an error"),
    **dict.fromkeys(
        ("trust_remote_code",), "import the class yourself and pass it as model_class=…"
    ),
    **dict.fromkeys(
        ("subfolder", "variant"),
        "give the path of the very folder, or use materialize with the file",
    ),
}


def _refuse_options(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs.keys() & _REFUSED.keys():
        raise InputError("Not an option of from_pretrained", where=name, hint=_REFUSED[name])


def _restore_generation_config(module: Any, folder: Path) -> None:
    # The constructor makes one of the config alone; beams and lengths of the checkpoint are in a
    # file of their own.
    if (folder / "generation_config.json").is_file() and getattr(
        module, "generation_config", None
    ) is not None:
        module.generation_config = type(module.generation_config).from_pretrained(
            folder, local_files_only=True
        )
