"""The save story: describe, write, record, rehearse, pin, and only then publish."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS

from mlflow_safeflavor import mlflow_compat
from mlflow_safeflavor.arguments import checked, require_arguments
from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec
from mlflow_safeflavor.artifact.staging import staging
from mlflow_safeflavor.checkpoints.damage import require_undamaged
from mlflow_safeflavor.environment.used import find_used
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.graph.engine import runtime_of
from mlflow_safeflavor.machine import give_back
from mlflow_safeflavor.module import user_code
from mlflow_safeflavor.module.dtypes import announced_cast, dtypes_of, input_dtype, serving_dtype
from mlflow_safeflavor.module.engine import ModuleEngine
from mlflow_safeflavor.module.kept import kept_module
from mlflow_safeflavor.module.saveable import require_saveable
from mlflow_safeflavor.module.structure import describe
from mlflow_safeflavor.module.subject import Subject
from mlflow_safeflavor.predict.model import LoadedModel, make_task
from mlflow_safeflavor.predict.options import MODEL_CONFIG, require_known_options, run_time_options
from mlflow_safeflavor.save.again import is_saved, log_saved
from mlflow_safeflavor.save.answers import answering, write_parity
from mlflow_safeflavor.save.code import write_code
from mlflow_safeflavor.save.example import split_example, write_example
from mlflow_safeflavor.save.given import source_of
from mlflow_safeflavor.save.graph import store_graph
from mlflow_safeflavor.save.logged import log
from mlflow_safeflavor.save.pinning import Pinning, needs_of, optional_modules
from mlflow_safeflavor.save.rehearsal import Rehearsal
from mlflow_safeflavor.save.signature import defaults_of, signature_of
from mlflow_safeflavor.save.write import seal, write_module, write_task
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.table import task_class

__all__ = ["log_model", "save_model"]


@checked
def save_model(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    task: str | None = None,
    dtype: str | torch.dtype | None = None,
    input_columns: Mapping[str, str] | None = None,
    preprocess: Callable[..., Any] | None = None,
    postprocess: Callable[..., Any] | None = None,
    input_example: Any = None,
    example_no_conversion: bool | None = None,
    signature: ModelSignature | Literal[False] | None = None,
    model_config: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    prompt_template: str | None = None,
    init_args: Mapping[str, Any] | None = None,
    graph: str = "auto",
    code_paths: Sequence[str | Path] | None = None,
    pip_requirements: Sequence[str] | str | Path | None = None,
    extra_pip_requirements: Sequence[str] | str | Path | None = None,
    conda_env: Mapping[str, Any] | str | Path | None = None,
    torch_index: str | Path | None = "auto",
    hashes: bool = False,
    allow_pickle: bool = False,
    on_damage: str = "error",
    rehearse: bool = True,
    metadata: Mapping[str, Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Save a model as a self-contained MLflow model, or raise an error and leave nothing behind.

    Args:
        model: A ``torch.nn.Module``, a ``transformers.Pipeline``, the path of a local checkpoint
            folder, or a dict with a ``model`` and its ``tokenizer`` or ``processor``. It is only
            looked at.
        path: Folder to create.
        tokenizer: Fast tokenizer of the model; not needed with a pipeline or folder.
        processor: Image processor or feature extractor of a model of images or sounds; not needed
            with a pipeline or folder.
        task: A name in ``tasks.table.TASKS``, as transformers' pipelines call them, or "custom" or
            "raw"; by default told from the model's class.
        dtype: Serving dtype that weights are stored in: "float32", "bfloat16", "float16" or
            "float64"; or "as-is", so that every tensor keeps its own. By default float32, and a
            cast to it is logged and recorded.
        input_columns: Field of the task → column name in requests, e.g. ``{"text": "buggy_code",
            "text_pair": "fixed_code"}``. By default a sole column has no name, so that any is
            taken.
        preprocess: For the custom task: ``(rows, tokenizer) -> dict of arrays``, the keyword
            arguments of ``forward``. Importable, or pickled with ``allow_pickle``.
        postprocess: For the custom task: ``(outputs, rows) -> rows``.
        input_example: Rows as ``predict`` takes them, or a tuple of these and a dict of params;
            stored, checked, and the rows replayed at each load. The custom and raw tasks need it.
        example_no_conversion: Changes nothing; MLflow 3 knows it no more. An example is stored as
            it is sent to a server.
        signature: By default the task's own; one given here must name the same inputs, and params
            that the task knows. It may name a sole column. Defaults in it count as ``params``.
            False for none: pyfunc then checks no input, and drops params.
        model_config: Options of the task (``pooling``, ``normalize``) and defaults of run-time
            options.
        params: Param of the task → its default for requests without it, as ``{"top_k": None,
            "max_length": 64}``.
        prompt_template: Of tasks that write: a text around each ``{prompt}``.
        init_args: Constructor arguments of a class of yours, where they cannot be told from its
            config: JSON values and transformers configs.
        graph: "auto" stores how the module is rebuilt and, where it can be proven, a graph of its
            forward that ONNX Runtime runs; "require" refuses a model without one; "only" stores
            nothing but the graph, so that serving needs neither the class nor its code; "no" stores
            none.
        code_paths: Files and folders with the code of your classes and hooks.
        pip_requirements: Replaces the recorded pins; used distributions that they do not bring are
            logged.
        extra_pip_requirements: Adds to them.
        conda_env: Replaces them, as a conda environment.
        torch_index: Where pip finds a torch with a local label: "auto" is PyTorch's own page of
            wheels, else the URL of an index or a folder of wheels; None drops the label.
        hashes: Write the hash of every file that may be installed into requirements.txt, so that
            pip, also that of ``mlflow models build-docker``, refuses any other; needs uv and an
            index.
        allow_pickle: Whether a module that no constructor gives back, or a hook that cannot be
            imported, may be pickled (without its tensors). Whoever loads it must agree, too.
        on_damage: "error" or "warn" when the model looks damaged already: buffers that its
            constructor does not compute, broken ties, values that look unwritten.
        rehearse: Load the staged artifact in a clean process before publishing it, and pin the
            distributions that it uses.
        metadata: Stored in ``MLmodel``.
        mlflow_model: ``MLmodel`` to add the flavor to; MLflow passes it.

    Raises:
        SafeFlavorError: One of its kinds; nothing is left at ``path`` then.
    """
    _require_one_of("graph", graph, ("auto", "require", "only", "no"))
    input_example, asked = split_example(input_example)
    hooks = {"preprocess": preprocess, "postprocess": postprocess}
    source = source_of(model, tokenizer, task, dtype, processor, hooks, input_example, signature)
    template = {} if prompt_template is None else {"prompt_template": prompt_template}
    options = _options(source.task, {**source.options, **(model_config or {}), **template}, graph)
    defaults = {**source.params, **defaults_of(signature), **(params or {})}
    subject = Subject.of(source.module)
    # Before any file is written: sparse, quantised and meta tensors have no form in safetensors.
    require_saveable(subject.slots)
    found = dtypes_of(subject.slots)
    serving = serving_dtype(dtype, found)
    cast_from = announced_cast(dtype, source.stored or found, serving)
    # Forwards may write to the module's buffers: that is put back, after a refusal as well.
    with kept_module(source.module), staging(path) as stage, Rehearsal(stage) as rehearsal:
        layout = Layout(stage)
        spec = write_task(source, serving, cast_from, input_columns, options, defaults, layout)
        bound = make_task(spec, layout, source.hooks, spec.model_config)
        examples = [] if input_example is None else bound.rows(input_example)
        rows = [*examples, *bound.golden_rows()]
        subject = _described(subject, graph, init_args, allow_pickle, bound, rows)
        subject = _undamaged(subject, on_damage)  # before gigabytes are written
        spec, inventory, casts = write_module(subject, source.hooks, spec, allow_pickle, layout)
        write_code(code_paths, layout)
        if rehearse:  # its imports take seconds, of another core while the graph is proven
            needs = needs_of(source, _graph_engines(spec, graph), code_paths)
            rehearsal.start(optional_modules(needs), allow_pickle=allow_pickle)
        with answering(subject, inventory, casts, bound, spec, layout) as served:
            bound.config = _measured(bound, served.engine, input_example, asked)
            models = _by_engine(served, inventory, rows, graph)
            answers, spec = write_parity(models, rows, spec, layout)
        engines = [model.engine.name for model in models]
        del models, served  # sessions with packed weights, before the rehearsal has its own
        give_back()
        pinning = Pinning(
            layout,
            needs_of(source, engines, code_paths),
            hashes=hashes,
            torch_index=torch_index,
            pip_requirements=pip_requirements,
            extra_pip_requirements=extra_pip_requirements,
            conda_env=conda_env,
        )
        pinning.write()  # the rehearsal compares environments, as every load does
        mlmodel = mlflow_model or Model()
        write_example(mlmodel, input_example, asked, bound, layout)
        signature = signature_of(bound, input_example, answers[: len(examples)], signature)
        seal(mlmodel, spec, signature, metadata, layout)
        used = find_used(*rehearsal.load(engines)) if rehearse else None
        if pinning.finish(used):  # files have changed that the manifest lists
            seal(mlmodel, spec, signature, metadata, layout)


@checked
def log_model(
    model: Any,
    name: str | None = None,
    *,
    artifact_path: str | None = None,
    registered_model_name: str | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    **kwargs: Any,
) -> ModelInfo:
    """Save a model and log it to the active run, or to a new one.

    Args:
        model: See ``save_model``; or the folder of a saved model, which is logged as it is. If that
            upload breaks off, the same call with ``model_id=…`` uploads what is missing.
        name: Name of the logged model, by default MLflow's; before MLflow 3, where models have
            none, its place below the run's artifacts, which has to be said.
        artifact_path: The same; what MLflow called it before.
        registered_model_name: Also make a version of this registered model.
        await_registration_for: Seconds to wait until that version is ready.
        kwargs: See ``save_model``.

    Returns:
        MLflow's ``ModelInfo``; its ``model_uri`` is what ``load_model`` takes.

    Raises:
        SafeFlavorError: One of its kinds; nothing is logged then.
    """
    require_arguments(kwargs, save_model, mlflow_compat.log_arguments(save_model))
    given = {
        "name": name,
        "artifact_path": artifact_path,
        "registered_model_name": registered_model_name,
        "await_registration_for": await_registration_for,
        **kwargs,
    }
    if is_saved(model):
        _require_none_of_a_save(kwargs)
        return log_saved(Path(model), __name__, **given)
    return log(sys.modules[__name__], model=model, **given)


def _require_none_of_a_save(given: Mapping[str, Any]) -> None:
    if wrong := sorted(given.keys() & inspect.signature(save_model).parameters.keys()):
        raise InputError(
            "A saved model is logged as it was saved",
            where=", ".join(wrong),
            hint="leave them out, or log the model itself",
        )


def _options(task: str, model_config: Mapping[str, Any], graph: str) -> dict[str, Any]:
    """The user's ``model_config``; unknown keys and values out of range are refused."""
    options = dict(model_config)
    require_known_options(options, {*MODEL_CONFIG, *task_class(task).task_options})
    # For its checks alone. Variables of this process do not count: the values are for others.
    run_time_options({name: options[name] for name in options.keys() & MODEL_CONFIG.keys()})
    _require_openvino(options, graph)
    return options


def _require_openvino(options: Mapping[str, Any], graph: str) -> None:
    """Refuse OpenVINO where it is not installed, or cannot take the graph or dtype asked for."""
    # At save, where the user can choose otherwise: a server would refuse the model at its start.
    if options.get("engine") != "openvino":
        return
    runtime_of("openvino")
    _require_one_of('graph beside engine="openvino"', graph, ("auto", "require", "only"))
    _require_one_of(
        'dtype beside engine="openvino"', options.get("dtype", ""), ("", "float32", "bfloat16")
    )


def _require_one_of(where: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(
            "Unknown value", where=where, wanted=" | ".join(allowed), found=repr(value)
        )


def _described(
    subject: Subject,
    graph: str,
    init_args: Mapping[str, Any] | None,
    allow_pickle: bool,
    task: Task,
    rows: Sequence[Row],
) -> Subject:
    """The subject with its structure; a graph alone is never rebuilt."""
    if graph == "only":
        name = user_code.name_of(type(subject.module))
        return replace(subject, structure={"kind": "graph", "class": name})
    forward = _forward(task, rows, subject)
    return describe(subject, init_args=init_args, allow_pickle=allow_pickle, forward=forward)


def _undamaged(subject: Subject, on_damage: str) -> Subject:
    """The subject without its skeleton, which is as large as the module, and was compared."""
    require_undamaged(subject, on_damage)
    return replace(subject, skeleton=None)


def _measured(
    task: Task, engine: Engine, example: Any, params: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The task's config with what it measures by an engine, after its params were checked."""
    task.require_defaults()
    if params:  # a task may have a param that each request must give
        task.check_params(params)
    return {**task.config, **task.measured(engine, example)}


def _by_engine(
    served: LoadedModel, inventory: Inventory, rows: Sequence[Row], graph: str
) -> list[LoadedModel]:
    """The model by each engine; the one that serves by default first.

    Graphs before the module: files that a rehearsal opens last are needs of the module alone.
    """
    required = graph in ("require", "only")
    graphs = [] if graph == "no" else store_graph(served, inventory, rows, required)
    return [*map(served.answered_by, graphs), *([] if graph == "only" else [served])]


def _graph_engines(spec: ModelSpec, graph: str) -> list[str]:
    """Engines that will run the graph of a model, if it can be proven."""
    if graph == "no" or spec.dtype != "float32":
        return []
    return ["onnx", *(["openvino"] if spec.model_config["engine"] == "openvino" else [])]


def _forward(
    task: Task, rows: Sequence[Row], subject: Subject
) -> Callable[[torch.nn.Module], None]:
    """A function that runs a module on example and golden rows, batched, then the first alone."""
    dtype = input_dtype(AS_IS, subject.slots)

    def run(module: torch.nn.Module) -> None:
        params = task.check_params(task.golden(task.config))
        pieces = [piece for row in task.encoded(rows, params) for piece in task.pieces(row)]
        # Alone, too: caches of a forward may depend on the number of rows.
        for batch in (pieces, pieces[:1]):
            task.forward(ModuleEngine(module, torch.device("cpu"), dtype), batch, params)

    return run
