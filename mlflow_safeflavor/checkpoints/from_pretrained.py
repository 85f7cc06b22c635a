"""Checkpoints on disk → modules that are right, or an error."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints import hub
from mlflow_safeflavor.checkpoints.transformers_keys import (
    base_prefix,
    convert,
    ignored_keys,
    is_converted,
    is_optional,
)
from mlflow_safeflavor.errors import InputError, StructureError, WeightsError
from mlflow_safeflavor.module.construction import Recipe, construct_fresh, construct_twice, require_memory
from mlflow_safeflavor.module.dtypes import announced_cast, count_dtypes, read_as
from mlflow_safeflavor.module.guard import guarded
from mlflow_safeflavor.module.inventory import find_slots, some
from mlflow_safeflavor.module.placement import _islands, resolve_dtype
from mlflow_safeflavor.module.state_dict import Fit, cast, find_groups, fit, read_state, require_fit, with_base_prefix

__all__ = ["bare_model", "from_pretrained", "processor_of", "read_checkpoint", "tokenizer_of"]

# --- from_pretrained -----------------------------------------------------------------------------


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
    """A checkpoint as a module whose every tensor came from the checkpoint or from the constructor.

    transformers' own loader builds modules on the meta device, and whatever its code then forgets to
    fill is garbage. So it is not used: the constructor runs on real memory, and the checkpoint is
    copied into what it allocated, so that ties and views stay what the constructor made them. What no
    checkpoint holds (non-persistent buffers, plain tensor attributes) is what the constructor
    computed, provided that two constructions agree on it. Only a checkpoint whose keys transformers
    would rename or convert goes through its loader, and then for nothing but the converted tensors.

    Other threads may load at the same time, with this function or with transformers' own.

    Args:
        name_or_path: A local folder, or the id of a hub repository.
        model_class: Class to build, any ``transformers.PreTrainedModel``; by default the one that the
            checkpoint's config names.
        dtype: "float32", "bfloat16", "float16" or "float64"; or "as-is", the dtype of most of its values. Submodules
            that their class keeps in float32 stay there. By default float32, and a cast to it is logged.
        revision: Commit of a hub repository, 40 hexadecimal digits; needed for one.
        new: Patterns like "classifier.*" of tensors that may be fresh: missing in the checkpoint, of
            another shape there, or random in the constructor.
        drop: Patterns like "lm_head.*" of keys of the checkpoint to leave out.
        kwargs: Changes of the config and arguments of the constructor, as for transformers; ``token``,
            ``cache_dir`` and ``local_files_only`` for the hub.

    Returns:
        The module on the CPU, in eval mode, with memory of its own.

    Raises:
        StructureError: The checkpoint or its class cannot be found, or the constructor fails.
        IntegrityError: A file is damaged.
        WeightsError: The checkpoint and the class do not fit each other.
    """
    module, found = read_checkpoint(
        name_or_path, model_class=model_class, dtype=dtype, revision=revision, new=new, drop=drop, **kwargs
    )
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
    """The module that ``from_pretrained`` returns, and the dtypes its weights are stored in; logs no cast."""
    read_as(dtype, {})  # a dtype that is none is said before anything is read
    _refuse_options(kwargs)
    folder = _folder_of(name_or_path, revision, kwargs)
    cls = model_class or _class_of(folder)
    # A class of the user's own is the user's own business; what a checkpoint says is not.
    with guarded(*_own(folder)) if cls.__module__.startswith("transformers.") else nullcontext():
        recipe = _recipe_for(cls, folder, kwargs)
        state = {key: value for key, value in read_state(folder).items() if not _matches(key, drop)}
        found = count_dtypes(state.values())
        module = _load(recipe, state, resolve_dtype(read_as(dtype, found)), new, folder)
        _restore_generation_config(module, folder)
    return module.eval(), found


_REFUSED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "say dtype='float32', 'bfloat16', 'float16', 'float64' or 'as-is'"),
    **dict.fromkeys(("low_cpu_mem_usage", "_fast_init"), "leave it out: nothing is ever on the meta device here"),
    **dict.fromkeys(
        ("device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "tp_plan"),
        "leave it out; the module comes on the CPU, and load_model(device=…) places a saved one",
    ),
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file"), "load the weights without quantisation"
    ),
    **dict.fromkeys(("ignore_mismatched_sizes",), "name what may be fresh: new=('classifier.*',)"),
    **dict.fromkeys(("state_dict",), "mlflow_safeflavor.materialize(module, state_dict)"),
    **dict.fromkeys(("output_loading_info",), "leave it out: what does not fit is an error"),
    **dict.fromkeys(("trust_remote_code",), "import the class yourself and pass it as model_class=…"),
    **dict.fromkeys(("subfolder", "variant"), "give the path of the very folder, or use materialize with the file"),
}


def _refuse_options(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs.keys() & _REFUSED.keys():
        raise InputError("Not an option of from_pretrained", where=name, way_out=_REFUSED[name])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
_HUB_FILES = ("*.json", "*.safetensors")


def _folder_of(name_or_path: str | Path, revision: str | None, kwargs: dict[str, Any]) -> Path:
    """The local folder of a checkpoint; takes the hub's options out of ``kwargs``."""
    options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if not hub.is_hub_id(name_or_path):
        raise StructureError("There is no such checkpoint", where=name_or_path, wanted="a folder, or a hub id")
    if not hub.is_commit(revision):
        raise StructureError(
            "There is no such folder, and a hub repository needs a pinned revision, as its branches and tags move",
            where=name_or_path,
            wanted="revision= a commit hash, 40 hexadecimal digits",
            found=repr(revision),
            way_out=f"take it from huggingface_hub.model_info({str(name_or_path)!r}).sha, or from the commit list "
            "of the repository",
        )
    return _download(str(name_or_path), str(revision), options)


def _download(name: str, revision: str, options: Mapping[str, Any]) -> Path:
    folder = hub.download(name, revision, _HUB_FILES, **options)
    if any(folder.glob("*.safetensors")):
        return folder
    # Pickled weights only where there are no others.
    return hub.download(name, revision, ["*.json", "*.bin"], **options)


def _own(folder: str | Path) -> list[Path]:
    """What may be read of a checkpoint: its folder, and where the links of a snapshot in the hub's cache lead."""
    folder = Path(os.path.abspath(folder))
    return [folder, *(above.parent / "blobs" for above in folder.parents if above.name == "snapshots")]


def _config_of(folder: Path) -> Any:
    import transformers

    try:
        with guarded(*_own(folder)):
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StructureError(
            "There is no readable checkpoint", where=folder, wanted="a folder with config.json", found=error
        ) from error


def _class_of(folder: Path) -> type[Any]:
    """The transformers class that a checkpoint's config names."""
    import transformers

    config = _config_of(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type):
        raise StructureError(
            "The checkpoint's class is not in the installed transformers",
            where=folder,
            found=name,
            way_out="say which class to build: model_class=…",
        )
    return cls


def _recipe_for(cls: type[Any], folder: Path, kwargs: dict[str, Any]) -> Recipe:
    """The class with the checkpoint's config, the user's changes of it, and what is left for the constructor."""
    config = kwargs.pop("config", None)
    attention = kwargs.pop("attn_implementation", None)
    if config is None:
        try:
            config, kwargs = cls.config_class.from_pretrained(
                folder, return_unused_kwargs=True, local_files_only=True, **kwargs
            )
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise StructureError(
                "The checkpoint's config cannot be read", where=folder, wanted=f"one for {cls.__name__}", found=error
            ) from error
    config = copy.deepcopy(config)
    _forget_code(config)
    if attention is not None:
        config._attn_implementation = attention
    config.name_or_path = os.fspath(folder)
    _require_model_type(cls, folder)
    if getattr(config, "quantization_config", None) is not None:
        raise StructureError(
            "The checkpoint is quantised, and its integer weights cannot be loaded as they are",
            where=folder,
            wanted="floating point weights",
            way_out="take the original checkpoint, or dequantise this one and save it",
        )
    return Recipe(cls, config, kwargs)


def _forget_code(config: Any) -> None:
    """Take the names of code out of a config and its parts: asked to build a part, transformers would ask back."""
    values = vars(config) if hasattr(config, "to_json_string") else config
    for name in ("auto_map", "custom_pipelines"):
        values.pop(name, None)
    for value in values.values():
        if isinstance(value, dict) or hasattr(value, "to_json_string"):
            _forget_code(value)


def _require_model_type(cls: type[Any], folder: Path) -> None:
    """Refuse another family's class. Keys of BERT fit RoBERTa, whose positions count from elsewhere."""
    config = folder / "config.json"
    found = read_json(config, strict=False).get("model_type") if config.is_file() else None
    wanted = getattr(cls.config_class, "model_type", None)
    if found and wanted and found != wanted:
        raise StructureError(
            "The checkpoint is of another model type than the class",
            where=folder,
            wanted=f"{wanted}, for {cls.__name__}",
            found=found,
            way_out="choose a class of the checkpoint's model type, or correct model_type in its config.json",
        )


def _restore_generation_config(module: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and getattr(module, "generation_config", None) is not None:
        module.generation_config = type(module.generation_config).from_pretrained(folder, local_files_only=True)


def bare_model(folder: str | Path) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the model of tokens in a folder, without heads and pooler.

    It is what sentence-transformers takes of a checkpoint: of T5 and its relatives the encoder.

    Raises:
        StructureError: There is no readable config, or transformers has no such model.
    """
    import transformers

    config = _config_of(Path(folder))
    cls: Any = transformers.AutoModel._model_mapping.get(type(config), None)
    if isinstance(cls, type):
        cls = getattr(transformers, f"{cls.__name__.removesuffix('Model')}EncoderModel", cls)
    if not isinstance(cls, type):
        raise StructureError("There is no model of tokens", where=folder, found=type(config).__name__)
    arguments: dict[str, Any] = {"model_class": cls, "drop": ("cls.*", "lm_head.*", "classifier.*", "pooler.*")}
    if "add_pooling_layer" in inspect.signature(cls).parameters:
        return {**arguments, "drop": (*arguments["drop"], "*.pooler.*"), "add_pooling_layer": False}
    return arguments


# --- loading -------------------------------------------------------------------------------------


def _load(
    recipe: Recipe, state: Mapping[str, torch.Tensor], dtype: torch.dtype, new: Sequence[str], where: Path
) -> torch.nn.Module:
    """Construct, fit, and only when everything fits, copy."""
    module, computed = construct_twice(recipe, dtype)
    result = _fit_or_convert(recipe, module, state, computed, new)
    require_fit(result, module.state_dict(), where, _WAY_OUT)
    absent = {group.names[0] for group in find_groups(module)} - result.values.keys()
    absent |= {slot.path for slot in find_slots(module) if not slot.persistent}
    if random := absent - computed:
        module, written = construct_fresh(recipe, dtype)
        _require_data(sorted(path for path in random if path not in written or not _matches(path, new)), where)
    _copy(module, result.values, dtype)
    require_memory(module)
    return module


_WAY_OUT = (
    "choose the class that the checkpoint was saved from (model_class=…); new=('head.*',) allows fresh tensors, "
    "drop=('head.*',) leaves keys out, tie_word_embeddings=False unties"
)


def _fit(module: torch.nn.Module, state: Mapping[str, torch.Tensor], computed: set[str], new: Sequence[str]) -> Fit:
    """Fit a state dict, and forgive what the class or the user said may be missing."""
    groups = find_groups(module)
    names = [name for group in groups for name in group.names]
    result = fit(groups, with_base_prefix(state, names, base_prefix(module)), ignored_keys(module))
    result.missing = [
        name
        for name in result.missing
        # The class calls a table of sinusoids optional, say: right, but only if the constructor computes it.
        if not _matches(name, new) and not (name in computed and is_optional(module, name))
    ]
    result.mismatched = {name: odd for name, odd in result.mismatched.items() if not _matches(name, new)}
    return result


def _require_data(paths: Sequence[str], where: object) -> None:
    if paths:
        raise WeightsError(
            "The checkpoint does not hold a tensor, and the constructor does not compute it",
            where=f"{where}: {some(paths)}",
            wanted="the same values in two constructions",
            found="random values, or memory that nobody wrote",
            way_out="make it a parameter or persistent buffer and save the checkpoint again; "
            f"new=({paths[0]!r},) accepts the random values of a new construction, but never unwritten memory",
        )


def _copy(module: torch.nn.Module, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Copy values into the memory that the constructor allocated, so that ties and views see them too."""
    islands = _islands(module, dtype)
    for group in find_groups(module):
        if group.names[0] not in values:
            continue
        value, target = values[group.names[0]], group.tensor
        if target.is_floating_point() and islands and islands.search(f".{group.names[0]}."):
            target.data = target.data.float()
        with torch.no_grad():
            target.copy_(cast(value, target.dtype, group.names[0]))


def _fit_or_convert(
    recipe: Recipe,
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    computed: set[str],
    new: Sequence[str],
) -> Fit:
    """Fit the state dict as it is, or else as transformers' loader converts it."""
    plain = _fit(module, state, computed, new)
    must = is_converted(module, state)
    # Another name or layout shows as a key without a place; nothing else can be helped by converting.
    if not must and not (plain.unexpected and hasattr(recipe.cls, "from_pretrained")):
        return plain
    try:
        converted, unexpected = convert(recipe, module, state)
    except WeightsError:
        raise
    except Exception:
        if must:
            raise
        return plain  # its loader cannot build this class; the message is what does not fit by name
    result = _fit(module, converted, computed, new)
    result.unexpected = unexpected
    return result if must or result.problems < plain.problems else plain


# --- tokenizers and processors -------------------------------------------------------------------


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a local checkpoint folder.

    Raises:
        StructureError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        with guarded(*_own(folder)):
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # transformers 5 makes one where the vocabulary's file is missing, and every word is unknown to it.
        if found.get_vocab().keys() <= {*found.all_special_tokens}:
            raise ValueError("a vocabulary of special tokens alone: its file is missing")
    except (OSError, ValueError, KeyError) as error:
        raise StructureError(
            "The checkpoint has no readable tokenizer", where=folder, found=error, way_out="pass tokenizer=…"
        ) from error
    return found


def processor_of(folder: str | Path, *, sounds: bool) -> Any:
    """The image processor, or feature extractor for sounds, in a local checkpoint folder.

    Raises:
        StructureError: There is none of transformers' own.
    """
    import transformers

    pillow = {"backend": "pil"} if int(transformers.__version__.partition(".")[0]) >= 5 else {"use_fast": False}
    auto: Any = transformers.AutoFeatureExtractor if sounds else transformers.AutoImageProcessor
    try:
        with guarded(*_own(folder)):
            return auto.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **({} if sounds else pillow)
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StructureError(
            "The checkpoint has no readable processor", where=folder, found=error, way_out="pass processor=…"
        ) from error
