"""The source of a save, made of any object that users hand over, by its type alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlflow_safeflavor.checkpoints import adapters, pipelines, sentences
from mlflow_safeflavor.checkpoints.from_pretrained import read_checkpoint
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.checkpoints.preprocessors import processor_of, tokenizer_of
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.inputs.processor import hears
from mlflow_safeflavor.tasks.table import infer_task, task_class

__all__ = ["Source", "resolve_source"]


def resolve_source(
    model: Any,
    tokenizer: Any,
    task: str | None,
    dtype: str | torch.dtype | None,
    processor: Any = None,
) -> Source:
    """Make the source of a save.

    Args:
        model: A module, a ``transformers.Pipeline``, a dict of the parts of one, or the path of a
            checkpoint folder.
        tokenizer: Goes before the model's own.
        task: None to tell it by the model.
        dtype: Dtype that a folder is read in; see ``dtypes.read_as``.
        processor: Goes before the model's own.

    Raises:
        InputError: The model is a pipeline with an argument that is not supported.
        StructureError: It is none of these, or the tokenizer, processor or task cannot be told.
    """
    source = _take_apart(model, dtype)
    task = task_class(task or source.task or _task_of(source.module)).name
    # What a CrossEncoder says of columns and labels is about classifying, and not about ranking.
    if source.columns is not None and task != source.task:
        params = {name: value for name, value in source.params.items() if name != "top_k"}
        source = replace(source, columns=None, params=params)
    # A pipeline of texts may carry a processor that its task does not use.
    if processor is None and "processor" in task_class(task).reads:
        processor = source.processor
    # A processor of transformers for speech holds a tokenizer beside its feature extractor.
    if "decoder" in task_class(task).reads and hasattr(processor, "feature_extractor"):
        tokenizer = processor.tokenizer if tokenizer is None else tokenizer
        processor = processor.feature_extractor
    source = replace(
        source,
        task=task,
        tokenizer=source.tokenizer if tokenizer is None else tokenizer,
        processor=processor,
    )
    # Last: only now the task is known, and with it which parts to read beside the weights.
    folder = model.get("model") if isinstance(model, Mapping) else model
    if isinstance(folder, (str, Path)):
        source = _with_parts_of(folder, source)
    _require_parts(source)
    return source


_PARTS = ("model", "task", "tokenizer", "processor", "image_processor", "feature_extractor")


def _take_apart(model: Any, dtype: str | torch.dtype | None) -> Source:
    # By type, the narrower first: a SentenceTransformer is a module, too, and a module may have
    # attributes named like a pipeline's.
    if sentences.is_object(model):
        return sentences.from_object(model)
    if isinstance(model, torch.nn.Module):
        return Source(model)
    # A folder of sentence-transformers with an adapter inside is refused by that reader.
    if (
        isinstance(model, (str, Path))
        and adapters.is_folder(model)
        and not sentences.is_folder(model)
    ):
        return adapters.from_folder(model)
    if isinstance(model, (str, Path)) and sentences.is_folder(model):
        return sentences.from_folder(model, dtype)
    if isinstance(model, (str, Path)):
        module, stored = read_checkpoint(model, dtype=dtype)
        return Source(module, stored=stored)
    if pipelines.is_pipeline(model):
        return pipelines.take_apart(model)
    if isinstance(model, Mapping) and "model" in model and model.keys() <= {*_PARTS}:
        return _of_parts(model, _take_apart(model["model"], dtype))
    raise StructureError(
        "This cannot be saved as a model",
        where="model",
        wanted="a torch.nn.Module, a transformers.Pipeline, the path of a checkpoint folder, or "
        f"a dict of {_PARTS}",
        found=f"a dict of {', '.join(map(repr, model))}"
        if isinstance(model, Mapping)
        else type(model).__name__,
        hint="name the parts: save_model(model, tokenizer=…)"
        if isinstance(model, (tuple, list))
        else None,
    )


def _of_parts(parts: Mapping[str, Any], source: Source) -> Source:
    """The source of a dict of parts, which go before those of its model."""
    processors = [parts.get(name) for name in ("processor", "image_processor", "feature_extractor")]
    return replace(
        source,
        task=parts.get("task") or source.task,
        tokenizer=parts.get("tokenizer") or source.tokenizer,
        processor=next(
            (processor for processor in processors if processor is not None), source.processor
        ),
    )


def _task_of(module: torch.nn.Module) -> str:
    return infer_task(type(module).__name__, getattr(module, "main_input_name", "input_ids"))


def _with_parts_of(folder: str | Path, source: Source) -> Source:
    """Add tokenizer and processor of a checkpoint where the task needs them and none is given."""
    cls = task_class(source.task)
    if source.processor is None and "processor" in cls.reads:
        source = replace(source, processor=processor_of(folder, sounds=cls.hears))
    # A task of texts, or one that reads both, or writes what it heard.
    beside = {"encoder", "decoder"} & {*cls.reads}
    if source.tokenizer is None and (beside or "processor" not in cls.reads):
        source = replace(source, tokenizer=tokenizer_of(folder))
    return source


def _require_parts(source: Source) -> None:
    cls = task_class(source.task)
    if source.tokenizer is None and {"encoder", "decoder"} & set(cls.reads):
        raise StructureError(
            "The task needs a tokenizer",
            where="tokenizer",
            wanted=f"the tokenizer of the {source.task} model",
            found="None",
        )
    # Given and not used, it would be missed only when pixels came out wrong.
    if source.processor is not None and not {"processor", "any_processor"} & set(cls.reads):
        raise InputError(
            "The task has no processor", where=f"task {source.task!r}", wanted="processor=None"
        )
    # A feature extractor for a task of images would fail at the first row, in words of its own.
    if "processor" in cls.reads and (
        source.processor is None or hears(source.processor) != cls.hears
    ):
        raise StructureError(
            "The task needs a processor",
            where="processor",
            wanted=f"one for {'sounds, a feature extractor' if cls.hears else 'images'}",
            found=type(source.processor).__name__,
        )
