"""The load story: locate, look, and only then build, fill, compare, place and replay."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor import environment as environments
from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact import (
    WAY_OUT,
    Layout,
    read_manifest,
    reason_against,
)
from mlflow_safeflavor.download import keep, located
from mlflow_safeflavor.errors import (
    AnswerError,
    InputError,
    ParityError,
    PlacementError,
    SafeFlavorError,
    WeightsError,
)
from mlflow_safeflavor.guard import guarded
from mlflow_safeflavor.options import run_time_options
from mlflow_safeflavor.report import LoadReport
from mlflow_safeflavor.saved import require_intact, require_none
from mlflow_safeflavor.spec import AS_IS, ModelSpec, guarded_parts, read_spec
from mlflow_safeflavor.trust import require_agreed, require_known, require_no_shadows

# torch, and what is built on it, is imported inside the functions below: the environment check comes
# first, so that a wrong environment is named before it fails to import, and so that what torch reads
# only once can still be set.
if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.engine import Engine
    from mlflow_safeflavor.graph import GraphModule
    from mlflow_safeflavor.inventory import Inventory
    from mlflow_safeflavor.model import LoadedModel
    from mlflow_safeflavor.weights_files import HeldFile

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
    prefer_graph: bool = False

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
    with report.timed("import"), _without_collecting():
        import mlflow_safeflavor.tensors  # noqa: F401  (and with it torch)
    with environments.naming_versions(recorded):
        return _load(spec, layout, options, report)


def _load(spec: ModelSpec, layout: Layout, options: LoadOptions, report: LoadReport) -> LoadedModel:
    """Everything after the environment was compared and torch imported."""
    from mlflow_safeflavor import tensors

    with report.timed("digest"):
        inventory = tensors.read_inventory(layout)
        _check_dtype(inventory, spec)
        weights = _hold_weights(inventory, layout, options, report)
    report.engine = _engine(spec, layout, options)
    module: torch.nn.Module
    if report.engine == "graph":
        with report.timed("rebuild"), _without_collecting():
            module, hooks, device = _read_graph(inventory, spec, layout, options, report)
    else:
        with report.timed("rebuild"), _without_collecting():
            module, hooks = rebuild(inventory, spec, layout, options, report)
        from mlflow_safeflavor import placement

        with report.timed("place"):
            device = _place(module, inventory, spec, layout, options, report)
            # By a map, accelerate may read from them whenever a part of the module runs.
            if options.device_map is None and not placement.maps_files(module, inventory):
                weights = []
                layout.held.clear()
    from mlflow_safeflavor.vocabulary import require_rows

    with _naming_failures(layout):
        model = bind(module, hooks, device, spec, layout, options, report, weights)
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
    if run_time_options(options.model_config, stored=spec.model_config)["engine"] == "graph":
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
    from mlflow_safeflavor.tensors import hold_weights

    weights, wrong = hold_weights(inventory, layout, hashes=options.hashes, rehash=options.verify == "rehash")
    require_none(wrong, "Weights are not the ones that were saved")
    report.hashed_bytes += sum(file.size for file in weights) if options.hashes else 0
    report.weights = ", ".join(sorted({file.kind for file in weights}))
    return weights


def _engine(spec: ModelSpec, layout: Layout, options: LoadOptions) -> str:
    """What is to answer, "graph" or "module": what was asked for, and can be had of what was saved.

    A graph belongs to one dtype and one device; whatever else is asked for needs the module.
    """
    chosen = run_time_options(options.model_config, stored=spec.model_config)
    alone = spec.structure == "graph"
    asked = "graph" if alone and chosen["engine"] == "auto" else chosen["engine"]
    other = {"dtype": _casts(spec, options), "device_map": options.device_map, "compile": chosen["compile"]}
    needs_module = [name for name, value in other.items() if value]
    reason = reason_against(layout)
    if asked == "auto":
        return "graph" if options.prefer_graph and not needs_module and reason is None else "module"
    if asked == "module" and alone:
        raise PlacementError(
            "The model was stored as a graph alone, so there is no module to rebuild",
            where="engine",
            wanted="graph",
            found="module",
            way_out='leave it out, or save the model with structure="auto"',
        )
    if asked == "graph" and (needs_module or reason is not None):
        raise PlacementError(
            "The model cannot be served as a graph like this",
            where=", ".join(needs_module) or "engine",
            wanted="a graph, which belongs to one dtype and one device",
            found=reason or ", ".join(f"{name}={other[name]!r}" for name in needs_module),
            way_out='leave those out, or pass engine="module" where the model was saved with its module',
        )
    return asked


def _casts(spec: ModelSpec, options: LoadOptions) -> str | None:
    """The dtype that was asked for, if it is another than the saved one."""
    asked = str(options.dtype or "").removeprefix("torch.")
    return asked if asked and asked != spec.dtype else None


def _read_graph(
    inventory: Inventory, spec: ModelSpec, layout: Layout, options: LoadOptions, report: LoadReport
) -> tuple[GraphModule, dict[str, Callable[..., Any]], torch.device]:
    from mlflow_safeflavor import devices, structure
    from mlflow_safeflavor.graph import GraphModule
    from mlflow_safeflavor.graph_file import read_graph

    graph, constants = read_graph(inventory, layout)
    device = devices.resolve_device(options.device)
    report.tensors, report.alias_groups = len(inventory.rows), len(inventory.data)
    report.weight_bytes, report.device = inventory.nbytes, str(device)
    described = structure.read_structure(layout, spec)
    return GraphModule(graph, constants, device), _hooks(described, inventory, layout, options), device


def _hooks(
    described: Mapping[str, Any], inventory: Inventory, layout: Layout, options: LoadOptions
) -> dict[str, Callable[..., Any]]:
    """The user's hooks by name, and no module."""
    from mlflow_safeflavor import inventory as inventories
    from mlflow_safeflavor import pickled, tensors, usercode

    names = described["hooks"]
    objects: dict[str, Any] = {}
    pickles = not all(names.values())
    realised = inventories.realise(inventory, tensors.read_tensors(inventory, layout)) if pickles else {}
    with guarded(layout.root, unpickles=True):
        if names and "code" in options.trust:
            usercode.make_importable(layout)
        if pickles:
            objects = pickled.load(layout.hooks_pickle, layout, described["hooks_pickle"], realised, options.trust)
        return {hook: usercode.import_name(name) if name else objects[hook] for hook, name in names.items()}


def rebuild(
    inventory: Inventory, spec: ModelSpec, layout: Layout, options: LoadOptions, report: LoadReport
) -> tuple[torch.nn.Module, dict[str, Callable[..., Any]]]:
    """Build on real memory, fill by assignment, compare every tensor's facts with the inventory.

    Returns:
        The module, and the user's hooks by name.
    """
    from mlflow_safeflavor import bounds, memory, pickled, structure, tensors, usercode
    from mlflow_safeflavor import inventory as inventories

    described = structure.read_structure(layout, spec)
    bounds.require_explained(described.get("config"), inventory, layout.name_of(layout.config))
    bounds.require_explained(described.get("tree"), inventory, layout.name_of(layout.structure))
    values = tensors.read_tensors(inventory, layout)
    objects: dict[str, Any] = {}
    hidden: dict[str, torch.Tensor] = {}
    with guarded(layout.root, unpickles=bool(spec.runs)):
        if "code" in options.trust:
            usercode.make_importable(layout)
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
        hooks = {hook: usercode.import_name(name) if name else objects[hook] for hook, name in names.items()}
    _check_tensors(module, inventory, hidden, report)
    return module, hooks


def _check_tensors(
    module: torch.nn.Module, inventory: Inventory, hidden: Mapping[str, torch.Tensor], report: LoadReport
) -> None:
    from mlflow_safeflavor.inventory import NOT_GIVEN_BACK, find_differences

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
    from mlflow_safeflavor import devices, placement, structure
    from mlflow_safeflavor.inventory import find_slots

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
    module: torch.nn.Module,
    hooks: Mapping[str, Callable[..., Any]],
    device: torch.device,
    spec: ModelSpec,
    layout: Layout,
    options: LoadOptions,
    report: LoadReport,
    weights: Sequence[HeldFile] = (),
) -> LoadedModel:
    """A module, the files its weights are mapped from, and what the spec says can be asked of it."""
    from mlflow_safeflavor.graph import GraphModule
    from mlflow_safeflavor.graph_engine import GraphEngine
    from mlflow_safeflavor.inventory import find_slots
    from mlflow_safeflavor.model import LoadedModel, make_task
    from mlflow_safeflavor.module_engine import ModuleEngine
    from mlflow_safeflavor.placement import input_dtype
    from mlflow_safeflavor.scheduler import Scheduler

    chosen = run_time_options(options.model_config, stored=spec.model_config)
    layout.keep(layout.tokenizer, layout.processor)
    task = make_task(spec, layout, hooks, chosen)
    dtype = input_dtype(options.dtype or spec.dtype, find_slots(module))
    engine: Engine
    if isinstance(module, GraphModule):
        engine = GraphEngine(module, device, dtype, _rebuilding(spec, layout, weights, options, dtype), weights)
    else:
        engine = ModuleEngine(module, device, dtype, weights, compile=chosen["compile"])
    names = ("max_batch_tokens", "forward_cost", "deterministic", "max_queue", "num_threads")
    scheduler = Scheduler(task, engine, **{name: chosen[name] for name in names})
    return LoadedModel(module, spec, report, task, engine, layout, scheduler, chosen)


def _rebuilding(
    spec: ModelSpec, layout: Layout, weights: Sequence[HeldFile], options: LoadOptions, dtype: torch.dtype
) -> Callable[[], Engine] | None:
    """What makes the engine of the module, for inputs that the graph does not take."""
    if spec.structure == "graph":
        return None
    from mlflow_safeflavor import structure, tensors
    from mlflow_safeflavor.module_engine import ModuleEngine
    from mlflow_safeflavor.weights_files import require_unchanged

    if structure.read_structure(layout, spec)["pickle"] is not None:
        layout.read_bytes(layout.structure_pickle)

    def make() -> Engine:
        require_unchanged(weights)
        report = LoadReport()
        inventory = tensors.read_inventory(layout)
        module, _ = rebuild(inventory, spec, layout, options, report)
        return ModuleEngine(module, _place(module, inventory, spec, layout, options, report), dtype, weights)

    return make


def _replay(model: LoadedModel, layout: Layout, options: LoadOptions, report: LoadReport) -> None:
    from mlflow_safeflavor import parity
    from mlflow_safeflavor.graph import GraphModule

    if options.verify == "off" or not options.replay:
        return
    with model.module.bounded() if isinstance(model.module, GraphModule) else nullcontext():
        result = parity.replay(model, layout)
    if not options.dtype or str(options.dtype).removeprefix("torch.") == model.spec.dtype:
        # After a cast on request the answers are meant to differ from the recorded ones.
        parity.require_parity(result, layout)
    report.golden_rows = len(result.rows)
    report.max_difference, report.bit_identical = result.max_difference, result.bit_identical


def _measure(model: LoadedModel, layout: Layout, options: LoadOptions) -> None:
    """Measure what a forward costs where nobody has, or only on another kind of device: the CPU it was saved on."""
    from mlflow_safeflavor import batching, parity

    known = model.scheduler.forward_cost and model.engine.on_cpu
    if known or options.verify == "off" or not options.replay:
        return
    golden = parity.read_golden(layout)
    rows = [model.task.from_record(row, golden.inputs(i)) for i, row in enumerate(golden.rows)]
    model.scheduler.forward_cost = batching.measure_forward_cost(
        model.task, model.engine, rows, model.options["max_batch_tokens"]
    )


@contextmanager
def _naming_failures(layout: Layout) -> Iterator[None]:
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
            where=layout.name_of(layout.parity),
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
