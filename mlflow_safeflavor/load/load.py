"""The load story: locate, look, and only then build, fill, compare, place and replay."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.description import read_description
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.manifest import read_manifest
from mlflow_safeflavor.artifact.plain_files import WAY_OUT
from mlflow_safeflavor.artifact.spec import AS_IS, ModelSpec, guarded_parts, read_spec
from mlflow_safeflavor.artifact.trust import require_agreed, require_known, require_no_shadows
from mlflow_safeflavor.environment import recorded as environments
from mlflow_safeflavor.errors import AnswerError, InputError, ParityError, PlacementError, SafeFlavorError, WeightsError
from mlflow_safeflavor.load.download import keep, located
from mlflow_safeflavor.load.engine_choice import casts, choose_engine, needs_no_module
from mlflow_safeflavor.load.saved import require_intact, require_none
from mlflow_safeflavor.module.guard import guarded
from mlflow_safeflavor.predict.options import run_time_options
from mlflow_safeflavor.predict.report import LoadReport

# torch, and what is built on it, is imported inside the functions below: a graph is served without it, and the
# environment check comes first, so that a wrong environment is named before it fails to import, and so that what torch
# reads only once can still be set.
if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.artifact.inventory_file import Inventory
    from mlflow_safeflavor.artifact.weights_files import HeldFile
    from mlflow_safeflavor.module.engine import ModuleEngine
    from mlflow_safeflavor.predict.model import LoadedModel
    from mlflow_safeflavor.tasks.engine import Engine

__all__ = [
    "LoadOptions",
    "bind",
    "guarded_parts",
    "keep_if_needed",
    "load_folder",
    "load_model",
    "read_spec",
    "rebuild",
]

_VERIFY = ("full", "rehash", "structure", "off")


@dataclass(frozen=True)
class LoadOptions:
    """How to load; see ``load_model``."""

    device: str | int | torch.device = "auto"
    dtype: str | torch.dtype | None = None
    device_map: str | Mapping[str, Any] | None = None
    verify: str = "full"
    environment: str = "warn"
    model_config: Mapping[str, Any] = field(default_factory=dict)
    trust: Collection[str] = field(default_factory=frozenset)
    replay: bool = True

    @property
    def hashes(self) -> bool:
        """Whether the bytes of all files are compared with what was recorded."""
        return self.verify in ("full", "rehash")


@checked
def load_model(
    model_uri: str | Path,
    dst_path: str | Path | None = None,
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    verify: str = "full",
    environment: str = "warn",
    trust: Collection[str] = (),
    model_config: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a model that ``save_model`` or ``log_model`` wrote, or raise an error that says why not.

    Args:
        model_uri: A folder, or any URI that MLflow resolves (``models:/name@champion``, ``runs:/…``).
        dst_path: Folder to download to, which stays; by default what is downloaded is removed once the model is loaded.
        device: "auto", "cpu", "cuda:0", an index of an accelerator, or a ``torch.device``.
        dtype: Cast to this dtype after everything was compared; None keeps the saved one.
        device_map: Spread over several devices instead of one: "auto", "balanced", "sequential", or a dict
            of submodule name → device, index or "disk". Needs accelerate.
        verify: "full" hashes every byte, of large files once a week on this host; "rehash" each time. "structure"
            compares names, sizes and all tensors' facts. All these replay the golden rows; "off" only compares the
            tensors' facts.
        environment: "error", "warn" or "ignore" when this environment is not the recorded one.
        trust: Kinds of the artifact's own code that may run: "code", "pickle".
        model_config: Run-time options other than those above, e.g. ``{"deterministic": True}``; by default those
            stored with the model.

    Returns:
        The model, on its device, in eval mode, without gradients, warmed up.

    Raises:
        SafeFlavorError: One of its kinds, each naming what was wanted and what was found.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        device_map=device_map,
        verify=verify,
        environment=environment,
        trust=frozenset(trust),
        model_config=dict(model_config or {}),
    )
    with ExitStack() as download:
        model = load_folder(download.enter_context(located(model_uri, dst_path)), options)
        keep_if_needed(download, model)
    return model


def load_folder(root: Path, options: LoadOptions) -> LoadedModel:
    """Load an artifact from a local folder: the one path that native loading and pyfunc share."""
    layout, report = Layout(root, keeps=True), LoadReport()
    with report.timed("look"):
        spec, recorded = _look(layout, options, report)
    with environments.naming_versions(recorded):
        return _load(spec, layout, options, report)


def _load(spec: ModelSpec, layout: Layout, options: LoadOptions, report: LoadReport) -> LoadedModel:
    """Everything after the environment was compared."""
    with report.timed("import"), _without_collecting():
        report.engine = choose_engine(spec, layout, options)
        if report.engine == "module":
            import mlflow_safeflavor.module.tensors  # noqa: F401  (and with it torch)
        else:
            from mlflow_safeflavor.graph.engine import runtime_of

            runtime_of(report.engine)
    from mlflow_safeflavor.artifact import inventory_file

    with report.timed("digest"):
        inventory = inventory_file.read_inventory(layout)
        _check_dtype(inventory, spec)
        weights = _hold_weights(inventory, layout, options, report)
    with report.timed("rebuild"), _without_collecting():
        load = _rebuild if report.engine == "module" else _open_graph
        engine, hooks = load(inventory, weights, spec, layout, options, report)
    from mlflow_safeflavor.tasks.inputs.vocabulary import require_rows

    with _naming_failures(layout.name_of(layout.recorded(report.engine)[0])):
        model = bind(engine, hooks, spec, layout, options, report)
        require_rows(spec.task_config, model.task.encoder, inventory)
        with report.timed("replay"):
            _replay(model, layout, options, report)
            _measure(model, layout, options)
    return model


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Python's garbage collector paused while torch and transformers are imported.

    They make hundreds of thousands of objects that stay; going through them again and again was seen to take a sixth
    of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _look(layout: Layout, options: LoadOptions, report: LoadReport) -> tuple[ModelSpec, environments.Environment]:
    """Everything that can be refused before torch is imported or anything is built."""
    if options.verify not in _VERIFY:
        raise InputError("Unknown value", where="verify", wanted=" | ".join(_VERIFY), found=repr(options.verify))
    spec, guarded = read_spec(layout)
    require_known(options.trust)
    for kind in spec.runs:
        require_agreed(kind, options.trust, spec.model_class)
    _check_files(layout, guarded, options, report)
    require_no_shadows(layout.code)
    recorded = environments.Environment.from_json(layout.read_json(layout.environment))
    if needs_no_module(spec, layout, options):
        recorded = recorded.for_graph()
    differences = environments.require_same(recorded, policy=options.environment)
    report.environment = tuple(str(difference) for difference in differences)
    return spec, recorded


def _check_files(layout: Layout, guarded: Mapping[str, Any], options: LoadOptions, report: LoadReport) -> None:
    files = read_manifest(layout)["files"]
    weights = frozenset(name for name in files if layout.is_weights(name))
    require_intact(layout, guarded, digests=options.hashes, elsewhere=weights)
    report.files = len(files)
    report.hashed_bytes = sum(files[name]["size"] for name in files.keys() - weights) if options.hashes else 0


def _check_dtype(inventory: Inventory, spec: ModelSpec) -> None:
    """Refuse a serving dtype that no parameter has; some may be kept in float32 beside it."""
    rows = [row for row in inventory.rows.values() if row.kind == "parameter" and "float" in row.dtype]
    if rows and spec.dtype != AS_IS and all(row.dtype != spec.dtype for row in rows):
        raise WeightsError(
            "The weights are not of the dtype that MLmodel says",
            where=rows[0].path,
            wanted=spec.dtype,
            found=rows[0].dtype,
            way_out=WAY_OUT,
        )


def _hold_weights(inventory: Inventory, layout: Layout, options: LoadOptions, report: LoadReport) -> list[HeldFile]:
    from mlflow_safeflavor.artifact.inventory_file import hold_weights

    weights, wrong = hold_weights(inventory, layout, hashes=options.hashes, rehash=options.verify == "rehash")
    require_none(wrong, "Weights are not the ones that were saved")
    report.hashed_bytes += sum(file.size for file in weights) if options.hashes else 0
    report.weights = ", ".join(sorted({file.kind for file in weights}))
    return weights


def _open_graph(
    inventory: Inventory,
    weights: list[HeldFile],
    spec: ModelSpec,
    layout: Layout,
    options: LoadOptions,
    report: LoadReport,
) -> tuple[Engine, dict[str, Callable[..., Any]]]:
    """What runs the graph, with the weights of the artifact, and the user's hooks by name."""
    from mlflow_safeflavor.environment import threads as cpu
    from mlflow_safeflavor.graph.engine import GraphEngine, runtime_of
    from mlflow_safeflavor.graph.file import keeps_bits, open_graph

    graph, arrays = open_graph(inventory.files, layout)
    threads = run_time_options(options.model_config, stored=spec.model_config)["num_threads"]
    runtime = runtime_of(report.engine, casts(spec, options))
    if report.engine == "onnx" and options.verify != "rehash":
        from mlflow_safeflavor.graph.onnx_engine import RUNTIME
        from mlflow_safeflavor.graph.packed_weights import PackedWeights

        runtime = partial(runtime, packed=PackedWeights(graph.content, weights, RUNTIME))
    session = runtime(graph, arrays, threads=cpu.find_budget(threads).threads)
    report.tensors, report.alias_groups = len(inventory.rows), len(inventory.data)
    report.weight_bytes, report.device = inventory.nbytes, "cpu"
    rebuild = None
    if spec.structure != "graph":
        late = layout.golden("module")  # nothing is read later than now
        for path in (*late, layout.structure_pickle) if spec.structure == "pickle" else late:
            layout.read_bytes(path)
        rebuild = _later(inventory, weights, spec, layout, options)
    hooks = _hooks(read_description(layout, spec), inventory, layout, options)
    kept = keeps_bits(layout, session.name, session.dtype)
    return GraphEngine(session, rebuild, weights, keeps_bits=kept), hooks


def _later(
    inventory: Inventory, weights: list[HeldFile], spec: ModelSpec, layout: Layout, options: LoadOptions
) -> Callable[[], ModuleEngine]:
    """What makes the engine of the module when it is wanted beside the graph's: checked as if it were loaded alone."""
    from mlflow_safeflavor.artifact.weights_files import require_unchanged

    recorded = environments.Environment.from_json(layout.read_json(layout.environment))

    def make() -> ModuleEngine:
        require_unchanged(weights)
        environments.require_same(recorded, policy=options.environment)
        report = LoadReport()
        beside = replace(options, device="cpu")  # where the graph is
        with environments.naming_missing():
            engine, hooks = _rebuild(inventory, list(weights), spec, layout, beside, report)
        _replay(bind(engine, hooks, spec, layout, beside, report), layout, beside, report)
        return engine

    return make


def _rebuild(
    inventory: Inventory,
    weights: list[HeldFile],
    spec: ModelSpec,
    layout: Layout,
    options: LoadOptions,
    report: LoadReport,
) -> tuple[ModuleEngine, dict[str, Callable[..., Any]]]:
    """What runs the module, rebuilt, compared and placed, and the user's hooks by name."""
    from mlflow_safeflavor.module import placement
    from mlflow_safeflavor.module.engine import ModuleEngine
    from mlflow_safeflavor.module.inventory import find_slots

    module, hooks = rebuild(inventory, spec, layout, options, report)
    with report.timed("place"):
        device = _place(module, inventory, spec, layout, options, report)
    # By a map, accelerate may read from them whenever a part of the module runs.
    if options.device_map is None and not placement.maps_files(module, inventory):
        weights = []
        layout.held.clear()
    compiles = run_time_options(options.model_config, stored=spec.model_config)["compile"]
    dtype = placement.input_dtype(options.dtype or spec.dtype, find_slots(module))
    return ModuleEngine(module, device, dtype, weights, compile=compiles), hooks


def _hooks(
    described: Mapping[str, Any], inventory: Inventory, layout: Layout, options: LoadOptions
) -> dict[str, Callable[..., Any]]:
    """The user's hooks by name, and no module."""
    from mlflow_safeflavor.module import user_code

    names = described["hooks"]
    objects = {} if all(names.values()) else _unpickled_hooks(described, inventory, layout, options)
    with guarded(layout.root, unpickles=True):
        if names and "code" in options.trust:
            user_code.make_importable(layout)
        return {hook: user_code.import_name(name) if name else objects[hook] for hook, name in names.items()}


def _unpickled_hooks(
    described: Mapping[str, Any], inventory: Inventory, layout: Layout, options: LoadOptions
) -> dict[str, Any]:
    from mlflow_safeflavor.module import inventory as inventories
    from mlflow_safeflavor.module import pickled, tensors, user_code

    realised = inventories.realise(inventory, tensors.read_tensors(inventory, layout))
    with guarded(layout.root, unpickles=True):
        if "code" in options.trust:
            user_code.make_importable(layout)
        return pickled.load(layout.hooks_pickle, layout, described["hooks_pickle"], realised, options.trust)


def rebuild(
    inventory: Inventory, spec: ModelSpec, layout: Layout, options: LoadOptions, report: LoadReport
) -> tuple[torch.nn.Module, dict[str, Callable[..., Any]]]:
    """Build on real memory, fill by assignment, compare every tensor's facts with the inventory.

    Returns:
        The module, and the user's hooks by name.
    """
    from mlflow_safeflavor.module import bounds, memory, pickled, structure, tensors, user_code
    from mlflow_safeflavor.module import inventory as inventories

    described = structure.read_structure(layout, spec)
    bounds.require_explained(described.get("config"), inventory, layout.name_of(layout.config))
    bounds.require_explained(described.get("tree"), inventory, layout.name_of(layout.structure))
    values = tensors.read_tensors(inventory, layout)
    objects: dict[str, Any] = {}
    hidden: dict[str, torch.Tensor] = {}
    with guarded(layout.root, unpickles=bool(spec.runs)):
        if "code" in options.trust:
            user_code.make_importable(layout)
        realised = inventories.realise(inventory, values) if "pickle" in spec.runs else {}
        for file, facts in ((layout.structure_pickle, "pickle"), (layout.hooks_pickle, "hooks_pickle")):
            if described[facts] is not None:
                with memory.real_memory(inventory=inventory):
                    objects |= pickled.load(file, layout, described[facts], realised, options.trust)
        if described["kind"] == "pickle":
            module = objects["module"].eval().requires_grad_(False)
            hidden = {path: realised[path] for path, row in inventory.rows.items() if row.kind == "hidden"}
        else:
            module = structure.build(described, trust=options.trust, inventory=inventory)
            inventories.fill(module, inventory, values)
        names = described["hooks"]
        hooks = {hook: user_code.import_name(name) if name else objects[hook] for hook, name in names.items()}
    _check_tensors(module, inventory, hidden, report)
    return module, hooks


def _check_tensors(
    module: torch.nn.Module, inventory: Inventory, hidden: Mapping[str, torch.Tensor], report: LoadReport
) -> None:
    from mlflow_safeflavor.module.inventory import NOT_GIVEN_BACK, find_differences

    if differences := list(find_differences(module, inventory, hidden)):
        raise WeightsError(
            "The rebuilt module is not the one that was saved",
            where=differences[0],
            found=f"{len(differences)} differences",
            way_out=NOT_GIVEN_BACK,
        )
    report.tensors, report.alias_groups = len(inventory.rows), len(inventory.data)
    report.weight_bytes = inventory.nbytes


def _place(
    module: torch.nn.Module,
    inventory: Inventory,
    spec: ModelSpec,
    layout: Layout,
    options: LoadOptions,
    report: LoadReport,
) -> torch.device:
    from mlflow_safeflavor.module import devices, placement, structure
    from mlflow_safeflavor.module.inventory import find_slots

    if options.device_map is not None and (options.device != "auto" or options.dtype):
        raise PlacementError(
            "device_map says where everything goes, in the dtype it was saved in",
            where="device_map",
            found=f"device={options.device!r}, dtype={options.dtype!r}",
            way_out="leave device and dtype out, or device_map",
        )
    device = devices.resolve_device(options.device)
    casts = {}
    if options.dtype:
        described = structure.read_structure(layout, spec)
        dtype = placement.resolve_dtype(options.dtype)
        casts = placement.dtype_plan(module, described, dtype, find_slots(module))
    if options.device_map is None:
        placement.place(module, device, casts)
    else:
        device = placement.dispatch(module, options.device_map, inventory, layout)
    report.device = str(device) if options.device_map is None else f"{device}, by device_map"
    return device


def bind(
    engine: Engine,
    hooks: Mapping[str, Callable[..., Any]],
    spec: ModelSpec,
    layout: Layout,
    options: LoadOptions,
    report: LoadReport,
) -> LoadedModel:
    """An engine, and what the spec says can be asked of it."""
    from mlflow_safeflavor.predict.model import LoadedModel, make_scheduler, make_task

    chosen = run_time_options(options.model_config, stored=spec.model_config)
    layout.keep(layout.tokenizer, layout.processor)
    task = make_task(spec, layout, hooks, chosen)
    return LoadedModel(spec, report, task, engine, layout, make_scheduler(task, engine, chosen), chosen)


def _replay(model: LoadedModel, layout: Layout, options: LoadOptions, report: LoadReport) -> None:
    from mlflow_safeflavor.predict import replay as parity

    if options.verify == "off" or not options.replay:
        return
    dtype = casts(model.spec, options)
    result = parity.replay(model, layout, dtype or "")
    if not dtype or model.engine.name == "openvino":
        # A module that was cast on request is meant to answer otherwise.
        parity.require_parity(result, layout, model.engine.name)
    report.golden_rows = len(result.rows)
    report.max_difference, report.bit_identical = result.max_difference, result.bit_identical


def _measure(model: LoadedModel, layout: Layout, options: LoadOptions) -> None:
    """Measure what a forward costs where nobody has, or only on another kind of device: the CPU it was saved on."""
    from mlflow_safeflavor.predict import batching
    from mlflow_safeflavor.predict import golden as parity

    known = model.scheduler.forward_cost and model.engine.on_cpu
    if known or options.verify == "off" or not options.replay:
        return
    golden = parity.read_golden(layout, model.engine.name)
    rows = [model.task.from_record(row, golden.inputs(i)) for i, row in enumerate(golden.rows)]
    model.scheduler.forward_cost = batching.measure_forward_cost(
        model.task, model.engine, rows, model.options["max_batch_tokens"]
    )


@contextmanager
def _naming_failures(where: str) -> Iterator[None]:
    """Whatever tasks, tokenizers and forwards raise over a record that is not what was saved, under a name of ours."""
    try:
        yield
    except BaseException as error:
        # Rows are at fault only when users hand them over. tokenizers panics with what is no Exception.
        named = isinstance(error, SafeFlavorError) and not isinstance(error, (InputError, AnswerError))
        if named or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ParityError(
            "The model cannot answer the rows that were recorded with it",
            where=where,
            found=f"{type(error).__name__}: {error}",
            way_out="save the model again in this environment",
        ) from error


def keep_if_needed(download: ExitStack, model: LoadedModel) -> None:
    """Keep a download that a loaded model may still read; see ``download.keep``.

    Code imports more of itself at any time, and modules outlive models. A file that is mapped is looked at before each
    forward, and removing it is a change.
    """
    if model.spec.runs:
        keep(download, sys.modules[__name__])
    elif "file" in model.report.weights.split(", "):
        keep(download, model)
