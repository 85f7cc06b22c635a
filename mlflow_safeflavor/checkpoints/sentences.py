"""Models of sentence-transformers, as objects and as folders; they answer as its ``encode`` does.

Both name the same facts: a module's ``get_config_dict`` returns the content of the file that
``save`` writes. The package is never imported: an object has it imported already, and a folder is
read without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints import cross_encoders
from mlflow_safeflavor.checkpoints.from_pretrained import read_checkpoint
from mlflow_safeflavor.checkpoints.given import Source, library_class, require_unchanged
from mlflow_safeflavor.checkpoints.recipe import bare_model
from mlflow_safeflavor.checkpoints.sentence_modules import (
    HINT,
    PACKAGE,
    Part,
    files_of,
    folder_tokenizer,
    layers_of,
    name_of,
    not_done,
    part_of,
    require_plain_first,
)
from mlflow_safeflavor.module.embedding import Embedder
from mlflow_safeflavor.tasks.text_ranking import ACTIVATION_KEYS

__all__ = ["from_folder", "from_object", "is_folder", "is_object"]

_CONFIG = "config_sentence_transformers.json"


def is_object(model: object) -> bool:
    """Whether it is a model of sentence-transformers, of any kind."""
    cls = library_class(model, PACKAGE)
    return cls is not None and (hasattr(model, "encode") or hasattr(model, "predict"))


def is_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model of sentence-transformers, a CrossEncoder among them."""
    config = Path(folder) / "config.json"
    return (Path(folder) / "modules.json").is_file() or (
        config.is_file() and {*ACTIVATION_KEYS} & read_json(config, strict=False).keys() != set()
    )


def from_object(model: Any) -> Source:
    """Take a ``SentenceTransformer`` or ``CrossEncoder`` apart.

    Raises:
        StructureError: It is something else, has methods of the user's own, or a module that is not
            supported.
    """
    cls = cast(type, library_class(model, PACKAGE))
    require_unchanged(model, cls, HINT)
    said = {
        name: getattr(model, name, None)
        for name in ("prompts", "default_prompt_name", "truncate_dim")
    }
    if cls.__name__ == "CrossEncoder":
        return cross_encoders.from_object(model, said)
    if cls.__name__ != "SentenceTransformer":
        raise not_done(name_of(cls), "a SentenceTransformer or a CrossEncoder")
    similarity = getattr(model, "similarity_fn_name", None)
    parts = [part_of(module) for module in model.children()]
    first = next(iter(model.children()))
    require_plain_first(parts[0])
    return _sentence_transformer(
        first.auto_model, first.tokenizer, parts[1:], {**said, "similarity": similarity}
    )


def from_folder(folder: str | Path, dtype: str | torch.dtype | None) -> Source:
    """Read a folder of ``SentenceTransformer.save`` or ``CrossEncoder.save``, of old releases too.

    Args:
        folder: One for which ``is_folder`` is true.
        dtype: Dtype that the model is read in; see ``dtypes.read_as``.

    Raises:
        StructureError: A file is missing, or speaks of a module that is not supported.
    """
    folder = Path(folder)
    said = read_json(folder / _CONFIG, strict=False) if (folder / _CONFIG).is_file() else {}
    modules = (
        read_json(folder / "modules.json", strict=False)
        if (folder / "modules.json").is_file()
        else []
    )
    # CrossEncoders of older releases have no modules.json.
    if not modules or said.get("model_type") == "CrossEncoder":
        return cross_encoders.from_folder(
            folder, [module["type"] for module in modules], said, dtype
        )
    if said.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise not_done(f"{folder}, {said['model_type']}", "a SentenceTransformer or a CrossEncoder")
    parts = [Part(module["type"], *files_of(folder / module["path"])) for module in modules]
    require_plain_first(parts[0])
    where = folder / modules[0]["path"]
    if (where / "adapter_config.json").is_file():
        raise not_done(where, "a whole model", "an adapter of PEFT")
    model, stored = read_checkpoint(where, dtype=dtype, **bare_model(where))
    said = {**said, "similarity": said.get("similarity_fn_name")}
    source = _sentence_transformer(model, folder_tokenizer(where, parts[0].config), parts[1:], said)
    return replace(source, stored=stored)


def _sentence_transformer(
    model: Any, tokenizer: Any, parts: Sequence[Part], said: Mapping[str, Any]
) -> Source:
    layers = list(layers_of(parts))
    kinds = [layer["kind"] for layer, _ in layers]
    # Without pooling there is an embedding for each token, and none for the text.
    if kinds.count("pooling") != 1:
        raise not_done(
            "modules",
            "one Pooling",
            f"{kinds.count('pooling')} of {len(kinds)} modules behind the model",
        )
    # Saved configs hold empty prompts ("query": ""), which mean that there is none.
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    default = said.get("default_prompt_name")
    options: dict[str, Any] = {
        "prompts": prompts,
        "include_prompt": all(part.config.get("include_prompt", True) for part in parts),
        "similarity": said.get("similarity"),
    }
    params = {"prompt_name": default} if default in prompts else {}
    if said.get("truncate_dim") is not None:
        params["truncate_dim"] = said["truncate_dim"]
    # The task pools and normalises by itself; further layers need a module around the transformer.
    if kinds in (["pooling"], ["pooling", "normalize"]):
        options |= {"pooling": layers[0][0]["kinds"], "normalize": len(kinds) == 2}
    else:
        model = Embedder(model, [layer for layer, _ in layers])
        for layer, (_, state) in zip(model.layers, layers, strict=True):
            layer.load_state_dict(dict(state), assign=True)
    return Source(model, "feature-extraction", tokenizer, options=options, params=params)
