"""The engine of a saved model: its graph in a session, or its module, rebuilt and placed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.description import read_description
from mlflow_safeflavor.artifact.weights_files import HeldFile, require_unchanged
from mlflow_safeflavor.environment.differences import naming_missing, require_same
from mlflow_safeflavor.environment.threads import find_budget
from mlflow_safeflavor.errors import PlacementError
from mlflow_safeflavor.load.engine_choice import casts
from mlflow_safeflavor.load.replay import replay
from mlflow_safeflavor.load.saved import Saved
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.predict.model import LoadedModel, make_model
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.inputs.vocabulary import require_rows

if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.graph.engine import GraphEngine
    from mlflow_safeflavor.module.engine import ModuleEngine

__all__ = ["bind", "open_engine"]

Hooks = dict[str, Callable[..., Any]]


def open_engine(
    name: str,
    saved: Saved,
    weights: list[HeldFile],
    *,
    device: str | int | torch.device,
    dtype: str | torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
    chosen: Mapping[str, Any],
    trust: Collection[str],
    policy: str,
    shares: bool,
    replays: bool,
) -> tuple[Engine, Hooks]:
    """The engine of a name from ``choose_engine``, with the weights; and the user's hooks by name.

    Args:
        name: "onnx", "openvino" or "module".
        saved: The model.
        weights: Its files of weights.
        device: As ``load_model`` takes it; a graph has the CPU.
        dtype: As ``load_model`` takes it.
        device_map: As ``load_model`` takes it; a graph has none.
        chosen: The run-time options.
        trust: Kinds of the artifact's own code that may run.
        policy: What ``load_model`` takes as ``environment``, for the module beside a graph.
        shares: Whether packed weights may come from, and go to, this host's cache.
        replays: Whether the module beside a graph answers its golden rows before it is used.
    """
    if name == "module":
        return _open_module(
            saved,
            weights,
            device=device,
            dtype=dtype,
            device_map=device_map,
            compiles=chosen["compile"],
            trust=trust,
        )
    module = None
    if saved.spec.structure != "graph":
        module = _beside(
            saved, weights, dtype=dtype, chosen=chosen, trust=trust, policy=policy, replays=replays
        )
    return _open_graph(name, saved, weights, module, dtype, chosen, trust, shares)


def _open_graph(
    name: str,
    saved: Saved,
    weights: list[HeldFile],
    module: Callable[[], ModuleEngine] | None,
    dtype: str | torch.dtype | None,
    chosen: Mapping[str, Any],
    trust: Collection[str],
    shares: bool,
) -> tuple[GraphEngine, Hooks]:
    """A session of ONNX Runtime or OpenVINO; ``module`` makes what answers beside the graph."""
    from mlflow_safeflavor.graph.engine import GraphEngine, runtime_of
    from mlflow_safeflavor.graph.file import keeps_bits, open_graph

    graph, arrays = open_graph(saved.inventory.files, saved.layout)
    runtime = runtime_of(name, casts(saved.spec, dtype))
    # OpenVINO packs weights in a format of its own, which workers cannot share.
    if name == "onnx":
        from mlflow_safeflavor.graph.onnx_engine import RUNTIME
        from mlflow_safeflavor.graph.packed_weights import PackedWeights

        files = dict(zip(saved.inventory.files, weights, strict=True))
        packed = PackedWeights(graph.content, weights, RUNTIME) if shares else None
        runtime = partial(runtime, files=files, packed=packed)
    session = runtime(graph, arrays, threads=find_budget(chosen["num_threads"]).threads)
    kept = keeps_bits(saved.layout, session.name, session.dtype)
    return GraphEngine(session, module, weights, keeps_bits=kept), _hooks_of(saved, trust)


def _hooks_of(saved: Saved, trust: Collection[str]) -> Hooks:
    """The user's hooks by name, without building the module."""
    from mlflow_safeflavor.module import user_code

    described = read_description(saved.layout, saved.spec)
    names = described["hooks"]
    objects: Mapping[str, Any] = {}
    # A hook without a name is pickled, apart from the module, so that a graph is served without it.
    if not all(names.values()):
        from mlflow_safeflavor.module.rebuild import unpickled_hooks

        objects = unpickled_hooks(described, saved.inventory, saved.layout, trust)
    # Importing a hook runs its module: agreed to, but still not to write files or open connections.
    with guarded(saved.layout.root, unpickles=True):
        if names and "code" in trust:
            user_code.make_importable(saved.layout)
        return {
            hook: user_code.import_name(name) if name else objects[hook]
            for hook, name in names.items()
        }


def _open_module(
    saved: Saved,
    weights: list[HeldFile],
    *,
    device: str | int | torch.device,
    dtype: str | torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
    compiles: bool,
    trust: Collection[str],
) -> tuple[ModuleEngine, Hooks]:
    """The module, rebuilt, compared and placed."""
    from mlflow_safeflavor.module import placement
    from mlflow_safeflavor.module.dtypes import input_dtype
    from mlflow_safeflavor.module.engine import ModuleEngine
    from mlflow_safeflavor.module.rebuild import rebuild
    from mlflow_safeflavor.module.slots import find_slots

    module, hooks = rebuild(saved.layout, saved.spec, saved.inventory, trust)
    placed = _place(module, saved, device, dtype, device_map)
    # Nothing maps the files any more: copied, cast or moved. Spread by a map, accelerate may read
    # from them whenever a part of the module runs.
    if device_map is None and not placement.maps_files(module, saved.inventory):
        weights = []
        saved.layout.held.clear()
    takes = input_dtype(dtype or saved.spec.dtype, find_slots(module))
    return ModuleEngine(module, placed, takes, weights, compile=compiles), hooks


def _place(
    module: torch.nn.Module,
    saved: Saved,
    asked: str | int | torch.device,
    dtype: str | torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
) -> torch.device:
    from mlflow_safeflavor.module import device_map as device_maps
    from mlflow_safeflavor.module import devices, placement, structure
    from mlflow_safeflavor.module.dtype_plan import casts_of
    from mlflow_safeflavor.module.dtypes import resolve_dtype
    from mlflow_safeflavor.module.slots import find_slots

    if device_map is not None and (asked != "auto" or dtype):
        raise PlacementError(
            "device_map says where everything goes, in the dtype it was saved in",
            where="device_map",
            found=f"device={asked!r}, dtype={dtype!r}",
            hint="leave device and dtype out, or device_map",
        )
    device = devices.resolve_device(asked)
    if device_map is not None:
        return device_maps.dispatch(module, device_map, saved.inventory, saved.layout)
    casts = {}
    if dtype:
        described = structure.read_structure(saved.layout, saved.spec)
        # Resolved here: "as-is", which the plan knows, is no dtype to load in.
        casts = casts_of(module, described, resolve_dtype(dtype), find_slots(module))
    placement.place(module, device, casts)
    return device


def bind(
    engine: Engine,
    hooks: Mapping[str, Callable[..., Any]],
    saved: Saved,
    chosen: Mapping[str, Any],
) -> LoadedModel:
    """An engine with task, tokenizer and hooks, as one model.

    Raises:
        IntegrityError: The tokenizer has tokens that the embedding table has no row for.
    """
    model = make_model(engine, hooks, saved.spec, saved.layout, chosen)
    # Golden rows use few tokens of a vocabulary: one beyond the table would fail in a request.
    require_rows(saved.spec.task_config, model.task.encoder, saved.inventory)
    return model


def _beside(
    saved: Saved,
    weights: list[HeldFile],
    *,
    dtype: str | torch.dtype | None,
    chosen: Mapping[str, Any],
    trust: Collection[str],
    policy: str,
    replays: bool,
) -> Callable[[], ModuleEngine]:
    """A function that makes the engine of the module, on the CPU, checked as if loaded alone.

    The module answers what the graph does not take, and is made when it is wanted; arguments as in
    ``open_engine``.
    """
    # Read now, kept by the layout: by the time that the module is made, the folder may be gone.
    late = saved.layout.golden("module")
    for path in (
        (*late, saved.layout.structure_pickle) if saved.spec.structure == "pickle" else late
    ):
        saved.layout.read_bytes(path)

    def make() -> ModuleEngine:
        require_unchanged(weights)
        # Of the graph's load only the graph's pins were compared.
        require_same(saved.environment, policy=policy)
        with naming_missing():
            engine, hooks = _open_module(
                saved,
                list(weights),
                device="cpu",
                dtype=dtype,
                device_map=None,
                compiles=chosen["compile"],
                trust=trust,
            )
        if replays:
            replay(bind(engine, hooks, saved, chosen), dtype)
        return engine

    return make
