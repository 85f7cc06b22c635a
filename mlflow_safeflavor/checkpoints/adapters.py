"""Folders of PEFT: an adapter alone, which is merged into the model that it was trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.checkpoints.from_pretrained import read_checkpoint
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.checkpoints.preprocessors import tokenizer_of
from mlflow_safeflavor.errors import StructureError, WeightsError
from mlflow_safeflavor.module.slots import some

__all__ = ["from_folder", "is_folder"]

_CONFIG = "adapter_config.json"
# PEFT's name of a task → endings of the names of its classes.
_HEADS = {
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "FEATURE_EXTRACTION": ("Model",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration", "MTModel"),
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
}


def is_folder(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (Path(folder) / _CONFIG).is_file()


def from_folder(folder: str | Path) -> Source:
    """The base model with the adapter merged into it, in float32 and on the CPU.

    Raises:
        StructureError: The base is not on this machine or of another class than the adapter, or
            there is no peft.
        WeightsError: The adapter and the base do not fit each other.
    """
    folder = Path(folder)
    said = read_json(folder / _CONFIG, strict=False)
    base = _base_of(folder, said.get("base_model_name_or_path"))
    if importlib.util.find_spec("peft") is None:
        raise _not_merged(
            "peft is not installed", folder, "pip install peft, or merge it elsewhere: "
        )
    import peft

    # In float32: merged in a half precision, the adapter's small changes would be rounded away.
    read, stored = read_checkpoint(base)
    model: Any = read
    whole = set(model.state_dict())
    # PEFT puts an adapter of a classifier into a base without a head, and drops the head's weights.
    ends = _HEADS.get(said.get("task_type") or "", ("",))
    if not type(model).__name__.endswith(ends):
        raise _not_merged(
            f"its base is a {type(model).__name__}",
            folder,
            f"a class for {said['task_type']} is needed: ",
        )
    try:
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(
            "The adapter does not fit its base model", where=folder, found=error, hint=_HINT
        ) from error
    # PEFT skips keys without a place and places without a key, without a word. Embeddings may be
    # stored whole, as they are in the base.
    given = peft.utils.load_peft_weights(str(folder), device="cpu").keys()
    placed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    beyond = {
        name for name in given - placed if name.removeprefix("base_model.model.") not in whole
    }
    if odd := sorted({*beyond, *(placed - given)}):
        raise WeightsError(
            "The adapter does not fit its base model", where=folder, found=some(odd), hint=_HINT
        )
    # An adapter may have added tokens: its own tokenizer goes before the base's.
    tokens = folder if (folder / "tokenizer_config.json").is_file() else base
    tokenizer = tokenizer_of(tokens) if (tokens / "tokenizer_config.json").is_file() else None
    return Source(adapted.merge_and_unload().eval(), tokenizer=tokenizer, stored=stored)


_HINT = "name the model that it was trained on: base_model_name_or_path in its adapter_config.json"


def _base_of(folder: Path, name: str | None) -> Path:
    # Relative to this process, as PEFT reads it, or to the adapter. A hub's id is not looked up: it
    # names no commit.
    for path in (Path(name or ""), folder / (name or "")):
        if name and (path / "config.json").is_file():
            return path
    raise _not_merged(f"its base model {name!r} is no folder of this machine", folder, "")


def _not_merged(found: str, folder: Path, first: str) -> StructureError:
    return StructureError(
        "An adapter cannot be merged into its base model",
        where=folder,
        found=found,
        hint=f"{first}model = peft.PeftModel.from_pretrained(base, "
        f"{str(folder)!r}).merge_and_unload(), where base is the module it was trained on; then "
        "save_model(model, tokenizer=…)",
    )
