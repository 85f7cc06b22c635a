"""Cross-encoders of sentence-transformers: a sequence classifier, and what makes its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints.from_pretrained import read_checkpoint
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.checkpoints.sentence_modules import (
    activation_named,
    activation_of,
    files_of,
    folder_tokenizer,
    name_of,
    not_done,
)
from mlflow_safeflavor.tasks.text_ranking import ACTIVATION_KEYS, ACTIVATIONS

__all__ = ["from_folder", "from_object"]


def from_object(model: Any, said: Mapping[str, Any]) -> Source:
    """Take a ``CrossEncoder`` apart.

    Args:
        model: One.
        said: Its prompts.

    Raises:
        StructureError: It has a module or a setting that is not done here.
    """
    _require_none(getattr(model, "keep_in_fp32_modules", None), "keep_in_fp32_modules")
    if isinstance(model, torch.nn.Module):
        _require_single([name_of(type(module)) for module in model.children()])
    activation = getattr(model, "activation_fn", None) or getattr(
        model, "default_activation_function", None
    )
    return _source(model.model, model.tokenizer, activation_of(activation), said)


def from_folder(folder: Path, types: Sequence[str], said: Mapping[str, Any], dtype: Any) -> Source:
    """Read what ``save`` of a ``CrossEncoder`` wrote, old and new.

    Args:
        folder: Where it was written.
        types: Classes of its modules; none in folders before version 6.
        said: The config of sentence-transformers.
        dtype: What the model is read in, as ``dtypes.read_as`` has it.

    Raises:
        StructureError: It speaks of a module that is not done here.
    """
    if types:
        _require_single(types)
        _require_plain_cross_encoder(files_of(folder)[0])
    _require_none(said.get("keep_in_fp32_modules"), "keep_in_fp32_modules")
    config = read_json(folder / "config.json", strict=False)
    name = (config.get("architectures") or ["no class"])[0]
    if not name.endswith("ForSequenceClassification"):
        raise not_done(
            f"{folder}, config.json, architectures", "a model for sequence classification", name
        )
    inside = (config.get(ACTIVATION_KEYS[0]) or {}).get("activation_fn")
    activation = said.get("activation_fn") or inside or config.get(ACTIVATION_KEYS[1])
    model, stored = read_checkpoint(folder, dtype=dtype)
    source = _source(model, folder_tokenizer(folder, files_of(folder)[0]), activation, said)
    return replace(source, stored=stored)


def _require_plain_cross_encoder(config: Mapping[str, Any]) -> None:
    known = (
        "transformer_task",
        "modality_config",
        "module_output_name",
        "max_seq_length",
        "do_lower_case",
    )
    for name, value in config.items():
        task = name == "transformer_task" and value != "sequence-classification"
        if value and (task or name not in (*known, "unpad_inputs")):
            raise not_done(
                f"Transformer, {name}", "sequence-classification" if task else "None", repr(value)
            )


def _source(model: Any, tokenizer: Any, activation: str | None, said: Mapping[str, Any]) -> Source:
    if prompt := (said.get("prompts") or {}).get(said.get("default_prompt_name")):
        raise not_done("CrossEncoder, default_prompt_name", "None", repr(prompt))
    labels = model.config.num_labels
    # As the package chooses where nothing is said: a score of one label, logits of several.
    usual = "torch.nn.Sigmoid" if labels == 1 else "torch.nn.Identity"
    function = activation_named(activation or usual, "CrossEncoder", tuple(ACTIVATIONS))
    return Source(
        model,
        "text-classification",
        tokenizer,
        params={
            "function_to_apply": ACTIVATIONS[function],
            **({"top_k": -1} if labels > 1 else {}),
        },
        columns={"text": "text", "text_pair": "text_pair"},
    )


def _require_single(types: Sequence[str]) -> None:
    if [name.rpartition(".")[2] for name in types] != ["Transformer"]:
        raise not_done("CrossEncoder", "a Transformer alone", ", ".join(types))


def _require_none(value: Any, name: str) -> None:
    if value:
        raise not_done(f"CrossEncoder, {name}", "None", repr(value))
