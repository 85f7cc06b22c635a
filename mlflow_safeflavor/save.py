"""The save story: describe, write, record, rehearse, and only then publish."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.models.utils import _save_example
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.utils.model_utils import _validate_and_copy_code_paths

from mlflow_safeflavor import environment as environments
from mlflow_safeflavor import inventory as inventories
from mlflow_safeflavor import parity, placement, structure, tensors
from mlflow_safeflavor.artifact import Layout, digest_of_file, staging, write_json, write_manifest
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.load import LoadOptions, bind, guarded_parts, rebuild
from mlflow_safeflavor.model import make_task
from mlflow_safeflavor.options import MODEL_CONFIG
from mlflow_safeflavor.rehearsal import rehearse as rehearse_load
from mlflow_safeflavor.report import LoadReport
from mlflow_safeflavor.rows import rows_of
from mlflow_safeflavor.source import Source, evaluating, resolve_source
from mlflow_safeflavor.spec import FLAVOR_NAME, ModelSpec
from mlflow_safeflavor.tasks import task_class
from mlflow_safeflavor.tasks.base import Row, Task
from mlflow_safeflavor.tokenizer import write_tokenizer
from mlflow_safeflavor.version import __version__

__all__ = ["log_model", "save_model"]

LOADER_MODULE = "mlflow_safeflavor"
"""Written into every saved model, so it can never move."""


def save_model(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    task: str | None = None,
    dtype: str | torch.dtype = "float32",
    input_columns: Mapping[str, str] | None = None,
    input_example: Any = None,
    signature: ModelSignature | None = None,
    model_config: Mapping[str, Any] | None = None,
    code_paths: Sequence[str] | None = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    conda_env: Mapping[str, Any] | str | None = None,
    torch_index: str | None = "auto",
    rehearse: bool = True,
    metadata: Mapping[str, Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Save a model as a self-contained MLflow model, or raise an error and leave nothing behind.

    Args:
        model: A ``transformers.PreTrainedModel``, a ``transformers.Pipeline`` or the path of a local
            checkpoint folder. It is only looked at.
        path: Folder to create.
        tokenizer: Fast tokenizer of the model; not needed with a pipeline or folder.
        task: "text-classification" or "feature-extraction"; by default told from the model's class.
        dtype: Serving dtype that weights are stored in: "float32", "bfloat16" or "float16".
        input_columns: Field of the task → column name in requests, e.g. ``{"text": "buggy_code",
            "text_pair": "fixed_code"}``.
        input_example: Rows as ``predict`` takes them; stored, checked, and replayed at each load.
        signature: By default the task's own; one given here must name the same inputs.
        model_config: Options of the task (``pooling``, ``normalize``) and defaults of run-time options.
        code_paths: Files and folders to store with the model.
        pip_requirements: Replaces the recorded pins.
        extra_pip_requirements: Adds to them.
        conda_env: Replaces them, as a conda environment.
        torch_index: Where pip finds a torch with a local label: "auto" is PyTorch's own wheel index,
            else a URL or folder; None drops the label.
        rehearse: Load the staged artifact in a clean process before publishing it.
        metadata: Stored in ``MLmodel``.
        mlflow_model: ``MLmodel`` to add the flavor to; MLflow passes it.

    Raises:
        SafeFlavorError: One of its kinds; nothing is left at ``path`` then.
    """
    serving_dtype = placement.resolve_dtype(dtype)
    source = resolve_source(model, tokenizer, task, inventories.dtype_name(serving_dtype))
    options = _options(source.task, model_config)
    with staging(path) as stage:
        layout = Layout(stage)
        cast = _write_module(source.module, serving_dtype, layout)
        spec = _write_task(source, serving_dtype, input_columns, options, layout)
        bound = make_task(spec, layout.tokenizer)
        _write_code(code_paths, layout)
        _write_environment(layout, torch_index, pip_requirements, extra_pip_requirements, conda_env)
        mlmodel = mlflow_model or Model()
        examples = _write_example(mlmodel, input_example, bound, layout)
        mlmodel = _write_mlmodel(mlmodel, spec, bound, signature, metadata, layout)
        _write_parity(source, spec, [*examples, *bound.golden_rows()], cast, layout)
        write_manifest(layout, mlmodel=guarded_parts(yaml.safe_load(layout.mlmodel.read_text(encoding="utf-8"))))
        if rehearse:
            rehearse_load(stage)


def log_model(
    model: Any,
    name: str,
    *,
    registered_model_name: str | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    **kwargs: Any,
) -> ModelInfo:
    """Save a model and log it to the active run, or to a new one.

    Args:
        model: See ``save_model``.
        name: Name of the logged model.
        registered_model_name: Also make a version of this registered model.
        await_registration_for: Seconds to wait until that version is ready.
        kwargs: See ``save_model``.

    Returns:
        MLflow's ``ModelInfo``; its ``model_uri`` is what ``load_model`` takes.

    Raises:
        SafeFlavorError: One of its kinds; nothing is logged then.
    """
    info: ModelInfo = Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        await_registration_for=await_registration_for,
        model=model,
        **kwargs,
    )
    return info


def _options(task: str, model_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's ``model_config``, with keys nobody reads refused."""
    known = {*MODEL_CONFIG, *task_class(task).task_options}
    options = dict(model_config or {})
    if unknown := sorted(options.keys() - known):
        raise InputError("Unknown key in model_config", where=", ".join(unknown), wanted=" | ".join(sorted(known)))
    return options


def _write_module(module: torch.nn.Module, dtype: torch.dtype, layout: Layout) -> bool:
    """Structure and tensors. Returns whether any tensor was cast to the serving dtype."""
    slots = inventories.find_slots(module)
    inventories.require_saveable(slots)
    described = structure.describe(module)
    casts = placement.dtype_plan(module, described, dtype, slots)
    inventory, values = inventories.take_inventory(slots, casts)
    structure.write_structure(described, layout)
    tensors.write_tensors(inventory, values, layout)
    return bool(casts)


def _write_task(
    source: Source,
    dtype: torch.dtype,
    input_columns: Mapping[str, str] | None,
    options: Mapping[str, Any],
    layout: Layout,
) -> ModelSpec:
    """Tokenizer, and what the task must remember; together with the rest of the spec."""
    cls = task_class(source.task)
    config = cls.describe(source.module, {key: options[key] for key in options.keys() & cls.task_options})
    return ModelSpec(
        task=source.task,
        dtype=inventories.dtype_name(dtype),
        structure="transformers",
        model_class=structure.class_name(source.module),
        task_config={**config, "encoder": write_tokenizer(source.tokenizer, layout.tokenizer)},
        input_columns=cls.columns_for(input_columns),
        model_config={key: options.get(key, default) for key, default in MODEL_CONFIG.items()},
        loader_version=__version__,
        loader_digest=loader_digest(),
    )


def loader_digest() -> str:
    """SHA-256 over the source of this package, as it is vendored."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + digest_of_file(file).encode())
    return digest.hexdigest()


def _write_code(code_paths: Sequence[str] | None, layout: Layout) -> None:
    """The loader itself, and the user's code, below ``code/``."""
    _validate_and_copy_code_paths(list(code_paths or []), layout.root)  # type: ignore[no-untyped-call]  # MLflow's
    target = layout.code / LOADER_MODULE
    if target.exists():
        raise InputError("code_paths must not hold the loader itself", where=LOADER_MODULE, way_out="leave it out")
    shutil.copytree(Path(__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))


def _write_environment(
    layout: Layout,
    torch_index: str | None,
    pip_requirements: Sequence[str] | str | None,
    extra_pip_requirements: Sequence[str] | str | None,
    conda_env: Mapping[str, Any] | str | None,
) -> None:
    recorded = environments.environment_files(
        layout.root,
        torch_build={
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        torch_index=torch_index,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        conda_env=conda_env,
    )
    write_json(layout.environment, recorded.to_json())


def _write_example(mlmodel: Model, example: Any, task: Task, layout: Layout) -> list[Row]:
    """Store the user's example as MLflow does; give its rows by field."""
    if example is None:
        return []
    rows = rows_of(example, task.columns, task.required)
    by_column = [{task.columns[field]: value for field, value in row.items()} for row in rows]
    _save_example(mlmodel, pd.DataFrame(by_column), os.fspath(layout.root))
    return rows


def _write_mlmodel(
    mlmodel: Model,
    spec: ModelSpec,
    task: Task,
    signature: ModelSignature | None,
    metadata: Mapping[str, Any] | None,
    layout: Layout,
) -> Model:
    mlmodel.signature = _checked_signature(signature, task)
    if metadata is not None:
        mlmodel.metadata = dict(metadata)
    pyfunc.add_to_model(
        mlmodel,
        loader_module=LOADER_MODULE,
        code=layout.CODE,
        conda_env=layout.conda.name,
        python_env=layout.python_env.name,
        model_config=dict(spec.model_config),
    )
    mlmodel.add_flavor(FLAVOR_NAME, **spec.to_flavor())
    mlmodel.model_size_bytes = sum(file.stat().st_size for file in layout.root.rglob("*") if file.is_file())
    mlmodel.save(os.fspath(layout.mlmodel))
    return mlmodel


def _checked_signature(given: ModelSignature | None, task: Task) -> ModelSignature:
    own = task.signature()
    if given is None:
        return own
    if given.inputs is None or set(given.inputs.input_names()) != set(own.inputs.input_names()):
        raise InputError(
            "The signature does not fit the task",
            where="signature",
            wanted=f"inputs {own.inputs.input_names()}",
            found=f"inputs {given.inputs.input_names() if given.inputs else None}",
            way_out="leave signature out, or rename columns with input_columns",
        )
    return given


def _write_parity(source: Source, spec: ModelSpec, rows: Sequence[Row], cast: bool, layout: Layout) -> None:
    """Record the golden rows from the very module the user handed over, unless it had to be cast.

    A cast model exists only in the artifact, so there the rebuilt module answers.
    """
    module = source.module
    if cast:
        module = rebuild(tensors.read_inventory(layout), layout, LoadReport())
    device = next((slot.tensor.device for slot in inventories.find_slots(module)), torch.device("cpu"))
    options = LoadOptions(max_batch_tokens=spec.model_config["max_batch_tokens"])
    with evaluating(module):
        model = bind(module, device, spec, layout, options, LoadReport())
        parity.record(model, rows, spec.dtype, layout)
