"""What the user handed over to be saved, as one thing: a module, its tokenizer and its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor import checkpoint
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.processor import hears
from mlflow_safeflavor.tasks import infer_task, task_class

__all__ = ["Source", "resolve_source"]


@dataclass(frozen=True)
class Source:
    """A module to save, with what belongs to it."""

    module: torch.nn.Module
    tokenizer: Any
    task: str
    processor: Any = None
    hooks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    example: Any = None


def resolve_source(model: Any, tokenizer: Any, task: str | None, dtype: str, processor: Any = None) -> Source:
    """Take apart a module, a ``transformers.Pipeline`` or a local checkpoint folder.

    Raises:
        StructureError: It is none of these, or the tokenizer, processor or task cannot be told.
    """
    folder = model if isinstance(model, (str, Path)) else None
    processors: list[Any] = []
    if folder is not None:
        model = checkpoint.from_pretrained(folder, dtype=dtype)
    elif hasattr(model, "model") and hasattr(model, "tokenizer") and hasattr(model, "task"):  # a Pipeline
        tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        task = task or model.task
        processors = [getattr(model, name, None) for name in ("image_processor", "feature_extractor")]
        model = model.model
    if not isinstance(model, torch.nn.Module):
        raise StructureError(
            "This cannot be saved as a model",
            where="model",
            wanted="a torch.nn.Module, a transformers.Pipeline, or the path of a checkpoint folder",
            found=type(model).__name__,
        )
    task = task_class(task or infer_task(type(model).__name__, getattr(model, "main_input_name", "input_ids"))).name
    if processor is None and "processor" in task_class(task).reads:
        processor = next((part for part in processors if part is not None), None)
    if folder is not None:
        tokenizer, processor = _parts_of(folder, task, tokenizer, processor)
    _require_parts(task, tokenizer, processor)
    return Source(model, tokenizer, task, processor)


def _parts_of(folder: str | Path, task: str, tokenizer: Any, processor: Any) -> tuple[Any, Any]:
    """Tokenizer and processor of a checkpoint, as far as the task needs them and they are not given."""
    cls = task_class(task)
    if "processor" not in cls.reads:
        return checkpoint.tokenizer_of(folder) if tokenizer is None else tokenizer, processor
    return tokenizer, checkpoint.processor_of(folder, sounds=cls.hears) if processor is None else processor


def _require_parts(task: str, tokenizer: Any, processor: Any) -> None:
    cls = task_class(task)
    if tokenizer is None and "encoder" in cls.reads:
        raise StructureError(
            "The task needs a tokenizer", where="tokenizer", wanted=f"the tokenizer of the {task} model", found="None"
        )
    if processor is not None and "processor" not in cls.reads:
        raise InputError("The task has no processor", where=f"task {task!r}", wanted="processor=None")
    if "processor" in cls.reads and (processor is None or hears(processor) != cls.hears):
        raise StructureError(
            "The task needs a processor",
            where="processor",
            wanted=f"one for {'sounds, a feature extractor' if cls.hears else 'images'}",
            found=type(processor).__name__,
        )
