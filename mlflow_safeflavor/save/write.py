"""The files of a model being saved: module, tokenizer, example, ``MLmodel`` and manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature

from mlflow_safeflavor.artifact.description import what_runs
from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import write_manifest
from mlflow_safeflavor.artifact.spec import FLAVOR_NAME, ModelSpec, guarded_parts
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module import inventory as inventories
from mlflow_safeflavor.module import pickled, tensors, user_code
from mlflow_safeflavor.module import structure as structures
from mlflow_safeflavor.module.dtype_plan import casts_of
from mlflow_safeflavor.module.engine import evaluating
from mlflow_safeflavor.module.saveable import require_saveable
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.predict.options import MODEL_CONFIG
from mlflow_safeflavor.save.code import LOADER_MODULE, loader_digest
from mlflow_safeflavor.tasks.inputs.ctc_tokenizer import is_ctc
from mlflow_safeflavor.tasks.inputs.processor import write_processor
from mlflow_safeflavor.tasks.inputs.tokenizer import write_tokenizer
from mlflow_safeflavor.tasks.inputs.vocabulary import require_known_tokens
from mlflow_safeflavor.tasks.table import task_class
from mlflow_safeflavor.version import __version__

__all__ = ["seal", "write_module", "write_task"]


def write_module(
    subject: Subject,
    hooks: Mapping[str, Callable[..., Any]],
    spec: ModelSpec,
    allow_pickle: bool,
    layout: Layout,
) -> tuple[ModelSpec, Inventory, dict[str, torch.dtype]]:
    """Write structure, pickle and tensors, these in the dtype of the spec.

    Returns:
        The spec with the structure, the inventory, and path → dtype of the tensors that were cast.
    """
    structure, slots = dict(subject.structure or {}), subject.slots
    casts = casts_of(subject.module, structure, spec.dtype, slots)
    # A name that imports back to the very function: lambdas and those of __main__ have none.
    names = {hook: user_code.importable_name(function) for hook, function in hooks.items()}
    to_pickle = {hook: hooks[hook] for hook, name in names.items() if name is None}
    if to_pickle and not allow_pickle:
        raise StructureError(
            "A hook cannot be imported anywhere else",
            where=", ".join(to_pickle),
            wanted="a function at the top of a module",
            hint="move it to a file and pass code_paths=[file], or pass allow_pickle=True",
        )
    structure |= {"hooks": names, "hooks_pickle": None, "pickle": None}
    # Hooks apart, so that a graph is served with them where the module's class is not installed.
    pickles: dict[str, dict[str, Any]] = {
        "pickle": {"module": subject.module} if structure["kind"] == "pickle" else {},
        "hooks_pickle": to_pickle,
    }
    for facts, file in (("pickle", layout.structure_pickle), ("hooks_pickle", layout.hooks_pickle)):
        if pickles[facts]:
            with evaluating(subject.module):
                content, slots, structure[facts] = pickled.dump(pickles[facts], slots)
            layout.data.mkdir(exist_ok=True)
            file.write_bytes(content)
            # Once more: a pickle reaches tensors outside of modules, which had no slot before.
            require_saveable(slots)
    # From the slots of the pickle, where there is one: it has all that the module's walk found.
    inventory, values = inventories.take_inventory(slots, casts)
    structures.write_structure(structure, layout)
    spec = replace(spec, structure=structure["kind"], runs=what_runs(structure))
    return spec, tensors.write_tensors(inventory, values, layout), casts


def write_task(
    source: Source,
    dtype: str,
    cast_from: str,
    input_columns: Mapping[str, str] | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    layout: Layout,
) -> ModelSpec:
    """Write tokenizer and processor; returns the spec, whose structure is not known yet."""
    cls = task_class(source.task)
    if cls.needs_example:
        if source.example is None:
            raise InputError(
                f"The {source.task} task needs an example: nobody else knows its rows",
                where="input_example",
                hint="pass input_example=… as predict takes it; its answers are recorded and "
                "replayed at each load",
            )
        input_columns = cls.columns_of(source.example) if input_columns is None else input_columns
    input_columns = source.columns if input_columns is None else input_columns
    config = cls.describe(
        source.module, {key: options[key] for key in options.keys() & cls.task_options}
    )
    config = cls.with_params(config, defaults)
    if cls.needs_example:
        config |= cls.describe_example(config, source.example)
    encoder = None
    if source.tokenizer is not None:
        # A token beyond the embedding table would fail in some request, long after saving; a
        # tokenizer of CTC has no table, and names what the model may say.
        ctc = is_ctc(source.tokenizer)
        table = None if ctc else require_known_tokens(source.tokenizer, source.module)
        encoder = {**write_tokenizer(source.tokenizer, layout.tokenizer), "table": table}
    if source.processor is not None:
        write_processor(source.processor, layout.processor)
    return ModelSpec(
        task=source.task,
        dtype=dtype,
        cast_from=cast_from,
        structure="graph",  # until the module is described
        model_class=user_code.name_of(type(source.module)),
        task_config={**config, "encoder": encoder},
        input_columns=cls.columns_for(input_columns),
        model_config={key: options.get(key, default) for key, default in MODEL_CONFIG.items()},
        loader_version=__version__,
        loader_digest=loader_digest(),
    )


def seal(
    mlmodel: Model,
    spec: ModelSpec,
    signature: ModelSignature | None,
    metadata: Mapping[str, Any] | None,
    layout: Layout,
) -> None:
    """Write ``MLmodel`` and the manifest, or both again."""
    # Else a second seal would count the first one's files into the size of the model.
    for file in (layout.mlmodel, layout.manifest):
        file.unlink(missing_ok=True)
    mlmodel.signature = signature
    given = mlmodel.metadata if metadata is None else metadata  # ``log_model`` gives it to MLflow
    task = task_class(spec.task)
    facts = task.metadata(spec.task_config)
    if facts or given is not None:
        mlmodel.metadata = {**facts, **(given or {})}
    pyfunc.add_to_model(
        mlmodel,
        loader_module=LOADER_MODULE,
        code=layout.CODE,
        conda_env=layout.conda.name,
        python_env=layout.python_env.name,
        model_config=dict(spec.model_config),
        streamable=task.streams,
    )
    mlmodel.add_flavor(FLAVOR_NAME, **spec.to_flavor())
    mlmodel.model_size_bytes = sum(
        file.stat().st_size for file in layout.root.rglob("*") if file.is_file()
    )
    mlmodel.save(os.fspath(layout.mlmodel))
    # Of the file as YAML reads it back, which is what a load compares: no tuples, no enums.
    write_manifest(
        layout, mlmodel=guarded_parts(yaml.safe_load(layout.mlmodel.read_text(encoding="utf-8")))
    )
