"""The recipe for a checkpoint's module: its class, config, and arguments of the constructor."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints.folder import own_folders
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.module.construction import Recipe
from mlflow_safeflavor.module.guarded import guarded

__all__ = ["bare_model", "class_of", "recipe_for"]


def _config_of(folder: Path) -> Any:
    import transformers

    # Guarded: what a config names (code, another repository) is neither fetched nor run.
    try:
        with guarded(*own_folders(folder)):
            return transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise StructureError(
            "There is no readable checkpoint",
            where=folder,
            wanted="a folder with config.json",
            found=error,
        ) from error


def class_of(folder: Path) -> type[Any]:
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
            hint="say which class to build: model_class=…",
        )
    return cls


def recipe_for(cls: type[Any], folder: Path, kwargs: dict[str, Any]) -> Recipe:
    """The class, the checkpoint's config with the user's changes, and constructor arguments."""
    config = kwargs.pop("config", None)
    attention = kwargs.pop("attn_implementation", None)
    if config is None:
        try:
            config, kwargs = cls.config_class.from_pretrained(
                folder, return_unused_kwargs=True, local_files_only=True, **kwargs
            )
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise StructureError(
                "The checkpoint's config cannot be read",
                where=folder,
                wanted=f"one for {cls.__name__}",
                found=error,
            ) from error
    # The user's config object stays as it is.
    config = copy.deepcopy(config)
    _forget_code(config)
    if attention is not None:
        config._attn_implementation = attention
    config.name_or_path = os.fspath(folder)  # as from_pretrained notes it
    _require_model_type(cls, folder)
    # Packed integers have the names of weights, and other shapes or, worse, the same.
    if getattr(config, "quantization_config", None) is not None:
        raise StructureError(
            "The checkpoint is quantised, and its integer weights cannot be loaded as they are",
            where=folder,
            wanted="floating point weights",
            hint="take the original checkpoint, or dequantise this one and save it",
        )
    return Recipe(cls, config, kwargs)


def _forget_code(config: Any) -> None:
    """Take the names of code out of a config and its parts."""
    # Building a part of the model, transformers would ask on the terminal whether to run them.
    values = vars(config) if hasattr(config, "to_json_string") else config
    for name in ("auto_map", "custom_pipelines"):
        values.pop(name, None)
    for value in values.values():
        if isinstance(value, dict) or hasattr(value, "to_json_string"):
            _forget_code(value)


def _require_model_type(cls: type[Any], folder: Path) -> None:
    """Refuse a class of another model type than the checkpoint's."""
    # All keys of BERT fit RoBERTa, but its positions begin at another number: garbage, silently.
    config = folder / "config.json"
    found = read_json(config, strict=False).get("model_type") if config.is_file() else None
    wanted = getattr(cls.config_class, "model_type", None)
    if found and wanted and found != wanted:
        raise StructureError(
            "The checkpoint is of another model type than the class",
            where=folder,
            wanted=f"{wanted}, for {cls.__name__}",
            found=found,
            hint="choose a class of the checkpoint's model type, or correct model_type in its "
            "config.json",
        )


def bare_model(folder: str | Path) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a folder's model of tokens, without heads and pooler.

    sentence-transformers takes the same of a checkpoint: of T5 and its relatives the encoder.

    Raises:
        StructureError: There is no readable config, or transformers has no such model.
    """
    import transformers

    config = _config_of(Path(folder))
    cls: Any = transformers.AutoModel._model_mapping.get(type(config), None)
    if isinstance(cls, type):
        cls = getattr(transformers, f"{cls.__name__.removesuffix('Model')}EncoderModel", cls)
    if not isinstance(cls, type):
        raise StructureError(
            "There is no model of tokens", where=folder, found=type(config).__name__
        )
    # Heads of the checkpoint have no place in the bare class, and would be unexpected keys.
    arguments: dict[str, Any] = {
        "model_class": cls,
        "drop": ("cls.*", "lm_head.*", "classifier.*", "pooler.*"),
    }
    if "add_pooling_layer" in inspect.signature(cls).parameters:
        return {**arguments, "drop": (*arguments["drop"], "*.pooler.*"), "add_pooling_layer": False}
    return arguments
