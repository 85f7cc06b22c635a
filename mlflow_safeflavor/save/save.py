"""The save story: describe, write, record, rehearse, pin what that used, and only then publish."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.models.utils import _save_example
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.utils.model_utils import _validate_and_copy_code_paths

from mlflow_safeflavor import mlflow_compat
from mlflow_safeflavor.arguments import checked, require_arguments
from mlflow_safeflavor.artifact import inventory_file
from mlflow_safeflavor.artifact.description import what_runs
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import write_manifest
from mlflow_safeflavor.artifact.plain_files import digest_of_file
from mlflow_safeflavor.artifact.spec import AS_IS, FLAVOR_NAME, ModelSpec, guarded_parts
from mlflow_safeflavor.artifact.staging import staging
from mlflow_safeflavor.artifact.trust import KINDS
from mlflow_safeflavor.checkpoints.damage import require_undamaged
from mlflow_safeflavor.checkpoints.given import Source
from mlflow_safeflavor.checkpoints.source import resolve_source
from mlflow_safeflavor.environment.used import find_used
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.graph.engine import GraphEngine, runtime_of
from mlflow_safeflavor.graph.file import open_graph, write_graph, write_reason
from mlflow_safeflavor.graph.weights import find_places
from mlflow_safeflavor.load.load import LoadOptions, bind, rebuild
from mlflow_safeflavor.machine import available_cpus
from mlflow_safeflavor.module import inventory as inventories
from mlflow_safeflavor.module import pickled, placement, tensors, user_code
from mlflow_safeflavor.module import structure as structures
from mlflow_safeflavor.module.dtypes import announced_cast, dtypes_of, serving_dtype
from mlflow_safeflavor.module.engine import ModuleEngine, evaluating
from mlflow_safeflavor.module.kept import kept_module, kept_parameters
from mlflow_safeflavor.module.wrappers import require_plain, taken_off
from mlflow_safeflavor.predict import golden
from mlflow_safeflavor.predict.batching import measure_forward_cost
from mlflow_safeflavor.predict.model import LoadedModel, make_task
from mlflow_safeflavor.predict.options import MODEL_CONFIG, run_time_options
from mlflow_safeflavor.predict.report import LoadReport
from mlflow_safeflavor.save import graph as recording
from mlflow_safeflavor.save.logged import log
from mlflow_safeflavor.save.pinning import Pinning
from mlflow_safeflavor.save.rehearsal import rehearse as rehearse_load
from mlflow_safeflavor.save.signature import columns_of, defaults_of, signature_of
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.inputs.processor import write_processor
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.tokenizer import write_tokenizer
from mlflow_safeflavor.tasks.inputs.vocabulary import require_known_tokens
from mlflow_safeflavor.tasks.table import task_class
from mlflow_safeflavor.version import __version__

__all__ = ["log_model", "save_model"]

PACKAGE = Path(__file__).parents[1]
LOADER_MODULE = "mlflow_safeflavor"
"""Written into every saved model, so it can never move."""


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
    signature: ModelSignature | None = None,
    model_config: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
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
            folder, or a dict with a ``model`` and its ``tokenizer`` or ``processor``. It is only looked at.
        path: Folder to create.
        tokenizer: Fast tokenizer of the model; not needed with a pipeline or folder.
        processor: Image processor or feature extractor of a model of images or sounds; not needed with a pipeline or
            folder.
        task: A name in ``mlflow_safeflavor.tasks.TASKS``, as transformers' pipelines call them, or "custom" or "raw";
            by default told from the model's class.
        dtype: Serving dtype that weights are stored in: "float32", "bfloat16", "float16" or "float64"; or "as-is", so
            that every tensor keeps its own. By default float32, and a cast to it is logged and recorded.
        input_columns: Field of the task → column name in requests, e.g. ``{"text": "buggy_code",
            "text_pair": "fixed_code"}``. By default a sole column has no name, so that any is taken.
        preprocess: For the custom task: ``(rows, tokenizer) -> dict of arrays``, the keyword arguments
            of ``forward``. Importable, or pickled with ``allow_pickle``.
        postprocess: For the custom task: ``(outputs, rows) -> rows``.
        input_example: Rows as ``predict`` takes them; stored, checked, and replayed at each load. The
            custom and raw tasks need it.
        signature: By default the task's own; one given here must name the same inputs, and params that the task
            knows. It may name a sole column. Defaults in it count as ``params``.
        model_config: Options of the task (``pooling``, ``normalize``) and defaults of run-time options.
        params: Param of the task → what it is where a request does not say, as ``{"top_k": None, "max_length": 64}``.
        init_args: Constructor arguments of a class of yours, where they cannot be told from its config:
            JSON values and transformers configs.
        graph: "auto" stores how the module is rebuilt and, where it can be proven, a graph of its forward that ONNX
            Runtime runs; "require" refuses a model without one; "only" stores nothing but the graph, so that serving
            needs neither the class nor its code; "no" stores none.
        code_paths: Files and folders with the code of your classes and hooks.
        pip_requirements: Replaces the recorded pins; what the rehearsal used and they do not bring is logged.
        extra_pip_requirements: Adds to them.
        conda_env: Replaces them, as a conda environment.
        torch_index: Where pip finds a torch with a local label: "auto" is PyTorch's own page of wheels,
            else the URL of an index or a folder of wheels; None drops the label.
        hashes: Write the hash of every file that may be installed into requirements.txt, so that pip, also that of
            ``mlflow models build-docker``, refuses any other; needs uv and an index.
        allow_pickle: Whether a module that no constructor gives back, or a hook that cannot be imported,
            may be pickled (without its tensors). Whoever loads it must agree, too.
        on_damage: "error" or "warn" when the model looks damaged already: buffers that its constructor does
            not compute, broken ties, values that look unwritten.
        rehearse: Load the staged artifact in a clean process before publishing it, and pin what that uses.
        metadata: Stored in ``MLmodel``.
        mlflow_model: ``MLmodel`` to add the flavor to; MLflow passes it.

    Raises:
        SafeFlavorError: One of its kinds; nothing is left at ``path`` then.
    """
    model = taken_off(model)
    source = resolve_source(model, tokenizer, task, dtype, processor)
    _require_one_of("graph", graph, ("auto", "require", "only", "no"))
    source = replace(source, module=taken_off(source.module), hooks=_hooks(source.task, preprocess, postprocess))
    columns = source.columns or columns_of(signature, task_class(source.task))
    source = replace(source, example=input_example, columns=columns)
    require_plain(source.module)
    options = _options(source.task, {**source.options, **(model_config or {})})
    _require_openvino(options, graph)
    defaults = {**source.params, **defaults_of(signature), **(params or {})}
    inventories.require_saveable(inventories.find_slots(source.module))
    serving = serving_dtype(dtype, dtypes_of(source.module))
    cast_from = announced_cast(dtype, source.stored or dtypes_of(source.module), serving)
    with kept_module(source.module), staging(path) as stage:
        layout = Layout(stage)
        spec = replace(_write_task(source, serving, input_columns, options, defaults, layout), cast_from=cast_from)
        how, kept = _how(source, graph, init_args, allow_pickle, _forward(source, spec, layout))
        source = replace(source, module=kept)
        require_undamaged(source.module, on_damage)
        described, cast = _write_module(source, serving, how, allow_pickle, layout)
        spec = replace(spec, structure=described["kind"], runs=what_runs(described))
        _write_code(code_paths, layout)
        with _answering(source, spec, described, cast, layout) as model:
            model.task.require_defaults()
            model.task.config = {**model.task.config, **model.task.measured(model.engine, source.example)}
            spec = replace(spec, task_config=model.task.config)
            rows = [*([] if source.example is None else model.task.rows(source.example)), *model.task.golden_rows()]
            engines = [] if graph == "no" else _write_graph(model, rows, graph in ("require", "only"))
            models = [*map(model.answered_by, engines), *([] if graph == "only" else [model])]
            answers, spec = _write_parity(models, rows, spec, layout)
        names = [answering.engine.name for answering in models]
        pinning = Pinning(
            layout,
            source,
            names,
            code_paths,
            hashes,
            torch_index=torch_index,
            pip_requirements=pip_requirements,
            extra_pip_requirements=extra_pip_requirements,
            conda_env=conda_env,
        )
        pinning.write()
        task_ = model.task
        mlmodel = mlflow_model or Model()
        _write_example(mlmodel, source.example, task_, layout)
        signature = signature_of(task_, source.example, answers[: len(rows) - len(task_.golden_rows())], signature)
        _seal(mlmodel, spec, signature, metadata, layout)
        # The graph first: what only the module needs is what is opened after that.
        used = None
        if rehearse:
            found = rehearse_load(stage, names, hidden=pinning.optional, allow_pickle=allow_pickle)
            used = find_used(*found)
        if pinning.finish(used):
            _seal(mlmodel, spec, signature, metadata, layout)


@checked
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
        name: Name of the logged model; before MLflow 3, where models have none, its place below the run's artifacts.
        registered_model_name: Also make a version of this registered model.
        await_registration_for: Seconds to wait until that version is ready.
        kwargs: See ``save_model``.

    Returns:
        MLflow's ``ModelInfo``; its ``model_uri`` is what ``load_model`` takes.

    Raises:
        SafeFlavorError: One of its kinds; nothing is logged then.
    """
    require_arguments(kwargs, save_model, mlflow_compat.log_arguments(save_model))
    return log(
        sys.modules[__name__],
        name,
        registered_model_name=registered_model_name,
        await_registration_for=await_registration_for,
        model=model,
        **kwargs,
    )


def _options(task: str, model_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The user's ``model_config``, with keys nobody reads and values out of range refused."""
    known = {*MODEL_CONFIG, *task_class(task).task_options}
    options = dict(model_config or {})
    if unknown := sorted(options.keys() - known):
        raise InputError("Unknown key in model_config", where=", ".join(unknown), wanted=" | ".join(sorted(known)))
    run_time_options({name: value for name, value in options.items() if name in MODEL_CONFIG}, environ={})
    return options


def _require_openvino(options: Mapping[str, Any], graph: str) -> None:
    """Refuse a model that OpenVINO is to serve where it is not installed, or cannot do what is asked for."""
    if options.get("engine") != "openvino":
        return
    runtime_of("openvino")
    _require_one_of('graph beside engine="openvino"', graph, ("auto", "require", "only"))
    _require_one_of('dtype beside engine="openvino"', options.get("dtype", ""), ("", "float32", "bfloat16"))


def _hooks(task: str, *given: Callable[..., Any] | None) -> dict[str, Callable[..., Any]]:
    hooks = {name: hook for name, hook in zip(("preprocess", "postprocess"), given, strict=True) if hook is not None}
    if len(hooks) != (2 if task == "custom" else 0):
        raise InputError(
            "preprocess and postprocess belong to the custom task, which needs both",
            where=f"task {task!r}",
            found=", ".join(hooks) or "none of them",
            way_out='pass task="custom", preprocess=… and postprocess=…',
        )
    return hooks


def _require_one_of(where: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError("Unknown value", where=where, wanted=" | ".join(allowed), found=repr(value))


def _how(
    source: Source,
    graph: str,
    init_args: Mapping[str, Any] | None,
    allow_pickle: bool,
    forward: Callable[[torch.nn.Module], None],
) -> tuple[dict[str, Any], torch.nn.Module]:
    """How the module is rebuilt, and the module to save; a graph is never rebuilt."""
    if graph == "only":
        return {"kind": "graph", "class": user_code.name_of(type(source.module))}, source.module
    return structures.describe(source.module, init_args=init_args, allow_pickle=allow_pickle, forward=forward)


def _forward(source: Source, spec: ModelSpec, layout: Layout) -> Callable[[torch.nn.Module], None]:
    """What runs a module of this structure on the example and the golden rows, all together and the first alone."""

    def run(module: torch.nn.Module) -> None:
        task = make_task(spec, layout, source.hooks, spec.model_config)
        rows = [*([] if source.example is None else task.rows(source.example)), *task.golden_rows()]
        params = task.check_params(task.golden(task.config))
        pieces = [piece for row in task.encoded(rows, params) for piece in task.pieces(row)]
        dtype = placement.input_dtype(AS_IS, inventories.find_slots(module))
        for batch in (pieces, pieces[:1]):
            task.forward(ModuleEngine(module, torch.device("cpu"), dtype), batch, params)

    return run


def _write_module(
    source: Source,
    dtype: str,
    described: dict[str, Any],
    allow_pickle: bool,
    layout: Layout,
) -> tuple[dict[str, Any], bool]:
    """Structure, pickle and tensors. Returns the structure, and whether any tensor was cast to the serving dtype."""
    slots = inventories.find_slots(source.module)
    casts = placement.dtype_plan(source.module, described, dtype, slots)
    names = {hook: user_code.importable_name(function) for hook, function in source.hooks.items()}
    to_pickle = {hook: source.hooks[hook] for hook, name in names.items() if name is None}
    if to_pickle and not allow_pickle:
        raise StructureError(
            "A hook cannot be imported anywhere else",
            where=", ".join(to_pickle),
            wanted="a function at the top of a module",
            way_out="move it to a file and pass code_paths=[file], or pass allow_pickle=True",
        )
    described |= {"hooks": names, "hooks_pickle": None, "pickle": None}
    # Apart, so that a graph is served with its hooks where the module's class is not there.
    pickles: dict[str, dict[str, Any]] = {
        "pickle": {"module": source.module} if described["kind"] == "pickle" else {},
        "hooks_pickle": to_pickle,
    }
    for facts, file in (("pickle", layout.structure_pickle), ("hooks_pickle", layout.hooks_pickle)):
        if pickles[facts]:
            with evaluating(source.module):
                content, slots, described[facts] = pickled.dump(pickles[facts], slots)
            layout.data.mkdir(exist_ok=True)
            file.write_bytes(content)
            inventories.require_saveable(slots)
    inventory, values = inventories.take_inventory(slots, casts)
    structures.write_structure(described, layout)
    tensors.write_tensors(inventory, values, layout)
    return described, bool(casts)


def _write_task(
    source: Source,
    dtype: str,
    input_columns: Mapping[str, str] | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    layout: Layout,
) -> ModelSpec:
    """Tokenizer, and what the task must remember; together with the rest of the spec, which tells no structure yet."""
    cls = task_class(source.task)
    if cls.needs_example:
        if source.example is None:
            raise InputError(
                f"The {source.task} task needs an example: nobody else knows its rows",
                where="input_example",
                way_out="pass input_example=… as predict takes it; its answers are recorded and replayed at each load",
            )
        input_columns = cls.columns_of(source.example) if input_columns is None else input_columns
    input_columns = source.columns if input_columns is None else input_columns
    config = cls.describe(source.module, {key: options[key] for key in options.keys() & cls.task_options})
    config = cls.with_params(config, defaults)
    if cls.needs_example:
        config |= cls.describe_example(config, source.example)
    encoder = None
    if source.tokenizer is not None:
        table = require_known_tokens(source.tokenizer, source.module)
        encoder = {**write_tokenizer(source.tokenizer, layout.tokenizer), "table": table}
    if source.processor is not None:
        write_processor(source.processor, layout.processor)
    return ModelSpec(
        task=source.task,
        dtype=dtype,
        structure="graph",
        model_class=user_code.name_of(type(source.module)),
        task_config={**config, "encoder": encoder},
        input_columns=cls.columns_for(input_columns),
        model_config={key: options.get(key, default) for key, default in MODEL_CONFIG.items()},
        loader_version=__version__,
        loader_digest=loader_digest(),
    )


def loader_digest() -> str:
    """SHA-256 over the files of this package, as it is vendored."""
    digest = hashlib.sha256()
    root = PACKAGE
    for file in sorted(file for file in root.rglob("*.*") if file.suffix in (".py", ".txt")):
        digest.update(file.relative_to(root).as_posix().encode() + digest_of_file(file).encode())
    return digest.hexdigest()


def _write_code(code_paths: Sequence[str | Path] | None, layout: Layout) -> None:
    """The loader itself, and the user's code, below ``code/``."""
    _validate_and_copy_code_paths([os.fspath(path) for path in code_paths or ()], layout.root)  # type: ignore[no-untyped-call]  # MLflow's
    target = layout.code / LOADER_MODULE
    if target.exists():
        raise InputError("code_paths must not hold the loader itself", where=LOADER_MODULE, way_out="leave it out")
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))


@contextmanager
def _answering(
    source: Source, spec: ModelSpec, described: Mapping[str, Any], cast: bool, layout: Layout
) -> Iterator[LoadedModel]:
    """The very module the user handed over, as it is served; unless it had to be cast.

    A cast model exists only in the artifact, so there the rebuilt module answers.
    """
    options = LoadOptions(trust=frozenset(KINDS))
    module, hooks = source.module, source.hooks
    device = next((slot.tensor.device for slot in inventories.find_slots(module)), torch.device("cpu"))
    if cast and described["kind"] == "graph":
        module = copy.deepcopy(module)
        dtypes = placement.dtype_plan(module, described, spec.dtype, inventories.find_slots(module))
        placement.place(module, device, dtypes)
    elif cast:
        device = torch.device("cpu")
        module, hooks = rebuild(inventory_file.read_inventory(layout), spec, layout, options, LoadReport())
    with evaluating(module), _aligned(module, layout), kept_parameters(module, lambda: _stored(layout)):
        dtype = placement.input_dtype(spec.dtype, inventories.find_slots(module))
        yield bind(ModuleEngine(module, device, dtype), hooks, spec, layout, options, LoadReport())


@contextmanager
def _aligned(module: torch.nn.Module, layout: Layout) -> Iterator[None]:
    """While inside, tensors that ``from_pretrained`` maps from anywhere in a file lie as they do after ``load_model``.

    Else the recorded answers could differ from those of every load in their last bits: see ``tensors.ALIGNMENT``.
    Tensors made in inference mode stay where they are, as torch lets nobody move them.
    """
    found = inventories.find_slots(module)
    slots = [slot for slot in found if not (tensors.is_aligned(slot.tensor) or slot.tensor.is_inference())]
    before = {id(slot.tensor): (slot.tensor, slot.tensor.data) for slot in slots}
    if slots:
        loaded = _stored(layout)
        for slot in slots:
            slot.tensor.data = loaded[slot.path].data
    try:
        yield
    finally:
        for tensor, data in before.values():
            tensor.data = data


def _stored(layout: Layout) -> dict[str, torch.Tensor]:
    inventory = inventory_file.read_inventory(layout)
    return inventories.realise(inventory, tensors.read_tensors(inventory, layout))


def _write_parity(
    models: Sequence[LoadedModel], rows: Sequence[Row], spec: ModelSpec, layout: Layout
) -> tuple[list[dict[str, Any]], ModelSpec]:
    """Record the golden rows with each engine, the one that serves by default first.

    Returns:
        The answers of that one, and the spec with what was measured.
    """
    first = models[0]
    cost = first.scheduler.forward_cost
    if not cost and first.engine.on_cpu:
        # Stored, so that all hosts make the same batches: the bits of an answer may depend on what shares its batch.
        first.answer(rows, first.task.golden(first.task.config))
        cost = measure_forward_cost(first.task, first.engine, rows, first.options["max_batch_tokens"])
    answers = []
    for model in models:
        model.scheduler.forward_cost = cost
        if isinstance(model.engine, GraphEngine):
            dtypes: Collection[str] = [model.engine.session.dtype]
        else:
            dtypes = dtypes_of(model.module) if spec.dtype == AS_IS else [spec.dtype]
        answers.append(golden.record(model, rows, dtypes, layout))
    return answers[0], replace(spec, model_config={**spec.model_config, "forward_cost": cost})


def _write_graph(model: LoadedModel, rows: Sequence[Row], required: bool) -> list[GraphEngine]:
    """Record the forward as a graph, or the reason why there is none. Returns what runs it, what serves first."""
    layout, slots = Layout(model.folder), inventories.find_slots(model.module)
    runtimes = {"onnx": runtime_of("onnx")}
    if model.spec.model_config["engine"] == "openvino":
        runtimes, required = {"openvino": runtime_of("openvino", model.spec.model_config["dtype"]), **runtimes}, True
    inventory = inventory_file.read_inventory(layout)
    try:
        if model.spec.dtype != "float32":
            raise recording.Refusal(f"a graph is served in float32, and this model in {model.spec.dtype}")
        inputs = recording.examples_of(model.task, cast("ModuleEngine", model.engine), rows)
        places, limit = find_places(inventory, layout), getattr(model.task, "limit", None)
        graph, facts = recording.record(model.module, slots, places, inputs, limit=limit, runtimes=runtimes)
    except recording.Refusal as refusal:
        if required:
            raise StructureError(
                "The forward of the model cannot be stored as a graph",
                where=model.spec.model_class,
                found=refusal,
                way_out='save it with graph="auto" and engine="auto", which serves the module where there is no graph',
            ) from refusal
        write_reason(str(refusal), layout)
        return []
    write_graph(graph, facts, layout)
    opened = open_graph(inventory.files, layout)
    return [GraphEngine(runtime(*opened, threads=available_cpus())) for runtime in runtimes.values()]


def _write_example(mlmodel: Model, example: Any, task: Task, layout: Layout) -> None:
    """Store the user's example as MLflow does."""
    if example is None:
        return
    _save_example(mlmodel, task.stored_example(example), os.fspath(layout.root))


def _seal(
    mlmodel: Model,
    spec: ModelSpec,
    signature: ModelSignature,
    metadata: Mapping[str, Any] | None,
    layout: Layout,
) -> None:
    """Write ``MLmodel`` and the manifest, or both again."""
    for file in (layout.mlmodel, layout.manifest):
        file.unlink(missing_ok=True)
    mlmodel.signature = signature
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
    write_manifest(layout, mlmodel=guarded_parts(yaml.safe_load(layout.mlmodel.read_text(encoding="utf-8"))))
