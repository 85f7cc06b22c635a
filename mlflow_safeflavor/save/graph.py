"""The graph of a module's forward: exported, checked as at each load, and proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

import numpy as np
import torch

from mlflow_safeflavor.artifact.inventory_file import Inventory, hold_weights
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.engine import GraphEngine, Session, runtime_of
from mlflow_safeflavor.graph.export import Exported, export
from mlflow_safeflavor.graph.file import open_graph, write_graph, write_reason
from mlflow_safeflavor.graph.graph import Graph
from mlflow_safeflavor.graph.onnx_file import Malformed
from mlflow_safeflavor.graph.proof import TEXT, Arrays, Facts, Refusal, prove
from mlflow_safeflavor.graph.trace import Forward, Inputs
from mlflow_safeflavor.graph.weights import Extent, find_extents
from mlflow_safeflavor.machine import available_cpus, give_back
from mlflow_safeflavor.module.engine import ModuleEngine, tensors_of
from mlflow_safeflavor.module.slots import Slot, find_slots
from mlflow_safeflavor.predict.model import LoadedModel
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.image import ImageTask
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["Refusal", "examples_of", "record", "store_graph"]


def record(
    module: torch.nn.Module,
    slots: Sequence[Slot],
    extents: Mapping[str, Extent],
    examples: Sequence[Inputs],
    *,
    limit: int | None = None,
    one_size: bool = False,
    runtimes: Mapping[str, Callable[..., Session]] | None = None,
) -> tuple[Graph, dict[str, Facts]]:
    """Export a module's forward, and prove that the graph answers as the module does.

    Args:
        module: As it is served: in eval mode, gradients off.
        slots: Its tensors.
        extents: Where those are in files of weights, by path.
        examples: Inputs of its forward, as the task makes them; at least one.
        limit: Most tokens of a text.
        one_size: Whether images always come in the size that they have in the examples.
        runtimes: Engine → function that makes its sessions; by default ONNX Runtime's.

    Returns:
        The graph, and facts of its proof by engine.

    Raises:
        Refusal: The forward cannot be traced with free sizes, calls operators that a graph may not
            have, or answers otherwise.
    """
    # A graph has one list of inputs; a forward that is sometimes given one more needs two.
    if len({tuple(sorted(inputs)) for inputs in examples}) != 1:
        raise Refusal("the forward is not always called with the same arguments")
    reasons = []
    for example, free in product(_candidates(examples), _freedoms(examples, one_size)):
        try:
            exported = export(module, slots, extents, examples, example, free)
            return _proven(
                module, exported, slots, example, limit, runtimes or {"onnx": runtime_of("onnx")}
            )
        except Refusal as refusal:
            reasons.append(str(refusal))
    # The first try frees most, and so says most about the forward.
    raise Refusal(reasons[0])


def _proven(
    module: torch.nn.Module,
    exported: Exported,
    slots: Sequence[Slot],
    example: Inputs,
    limit: int | None,
    runtimes: Mapping[str, Callable[..., Session]],
) -> tuple[Graph, dict[str, Facts]]:
    graph = _read(exported.content({}))
    arrays = {
        slot.path: slot.tensor.detach().cpu().numpy()
        for slot in slots
        if slot.path in graph.weights
    }
    forward = Forward(module)
    device = next((tensor.device for tensor in example.values()), torch.device("cpu"))

    def run(inputs: Arrays) -> Arrays:
        # Copied: a forward may write to its inputs, and the sessions get the same arrays.
        tensors = {
            name: torch.from_numpy(array.copy()).to(device) for name, array in inputs.items()
        }
        with torch.inference_mode():
            return {name: tensor.cpu().numpy() for name, tensor in forward(tensors).items()}

    plain = {name: tensor.cpu().numpy() for name, tensor in example.items()}
    # Of several thread counts, since sums may be cut by them: whether bits hold is proven.
    threads = sorted({1, 2, available_cpus()})
    facts = {}
    for name, runtime in runtimes.items():
        try:
            opened = partial(_opened, runtime, graph, arrays)
            facts[name] = prove(run, opened, threads, graph.inputs, plain, limit, seed=0)
        finally:
            give_back()  # what the sessions had packed, before there is the one that answers
    # Sizes that the module took in the proof. Of a size that had to be the same each time nothing
    # is known for others, so it is written into the graph; rows and lengths must not be such.
    seen = next(iter(facts.values())).sizes
    fixed = {name: min(sizes) for name, sizes in seen.items() if len(sizes) == 1}
    if narrow := fixed.keys() & {"rows", "length"}:
        raise Refusal(
            f"the module took no inputs of another number of {min(narrow)} to prove the graph on"
        )
    return _read(exported.content(fixed)), facts


def _opened(
    runtime: Callable[..., Session], graph: Graph, arrays: Mapping[str, np.ndarray], threads: int
) -> Session:
    try:
        return runtime(graph, arrays, threads=threads)
    except StructureError as error:  # an operator that the engine has no kernel for
        raise Refusal(f"{error.what}: {error.found}") from error


def _read(content: bytes) -> Graph:
    try:
        return read(content)
    except Malformed as error:
        raise Refusal(f"the exported graph: {error}") from error


class _Listener:
    """An engine that keeps the inputs of each forward."""

    name = "listener"
    keeps_bits = False

    def __init__(self, engine: ModuleEngine) -> None:
        self.engine, self.on_cpu, self.module = engine, engine.on_cpu, engine.module
        self.heard: list[Inputs] = []

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.heard.append(tensors_of(inputs, self.engine.device, self.engine.dtype))
        return self.engine(inputs)

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        raise Refusal(
            "the model writes text token by token, with a cache that grows: that is no single "
            "forward"
        )


def examples_of(task: Task, engine: ModuleEngine, rows: Sequence[Row]) -> list[Inputs]:
    """Inputs that a task gives to the engine for these rows: in one batch, and the first two alone.

    Raises:
        Refusal: It has no forward of its own.
    """
    params = task.check_params(task.golden(task.config))
    pieces = [piece for row in task.uncapped.encoded(rows, params) for piece in task.pieces(row)]
    listener = _Listener(engine)
    for batch in (pieces, *([piece] for piece in pieces[:2])):
        task.forward(listener, batch, params)
    return _equally_wide(listener.heard)


def _equally_wide(examples: Sequence[Inputs]) -> list[Inputs]:
    """The examples with one dtype for each input: int64 where they differ."""
    # Processors make masks of other dtypes for one row than for several.
    dtypes: dict[str, set[torch.dtype]] = {}
    for inputs in examples:
        for name, tensor in inputs.items():
            dtypes.setdefault(name, set()).add(tensor.dtype)
    return [
        {name: t.to(torch.int64) if len(dtypes[name]) > 1 else t for name, t in e.items()}
        for e in examples
    ]


def _has_one_size(task: Task) -> bool:
    """Whether the processor makes images of all shapes equally large, as most do."""
    if not isinstance(task, ImageTask):
        return False
    # High, wide and square ones.
    params = task.check_params(task.golden(task.config))
    made = task.uncapped.encoded(task.golden_rows(), params)
    images = [features["pixel_values"] for features in made if "pixel_values" in features]
    return len({image.shape for image in images}) == 1


def _candidates(examples: Sequence[Inputs]) -> Iterator[Inputs]:
    """Inputs to trace with, the best first."""
    largest = max(examples, key=lambda inputs: sum(tensor.numel() for tensor in inputs.values()))
    # torch.export takes a size of 0 or 1 for a constant: a single row is repeated, to be two.
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in largest.values()):
        yield {
            name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in largest.items()
        }
    yield largest


def _freedoms(examples: Sequence[Inputs], one_size: bool) -> list[Mapping[str, set[int]]]:
    """Dimensions to be free, by input, one choice after the other.

    All, unless images have one size; then rows, lengths and those seen to differ.
    """
    every = {name: set(range(tensor.dim())) for name, tensor in examples[0].items()}
    some = {
        name: {
            i
            for i in dims
            if i == 0 or (name in TEXT and i == 1) or len({e[name].shape[i] for e in examples}) > 1
        }
        for name, dims in every.items()
    }
    return [some] if one_size or some == every else [every, some]


def store_graph(
    model: LoadedModel, inventory: Inventory, rows: Sequence[Row], required: bool
) -> list[GraphEngine]:
    """Store the forward as a graph, or the reason why there is none.

    Returns:
        Its engines, the one that serves by default first.
    """
    layout = Layout(model.folder)
    written, _ = hold_weights(inventory, layout, hashes=False)
    files = dict(zip(inventory.files, written, strict=True))
    runtimes: dict[str, Callable[..., Session]] = {"onnx": partial(runtime_of("onnx"), files=files)}
    # ONNX Runtime is proven as well: who loads the model may not trust OpenVINO with it. A module
    # cannot stand in for an engine that was asked for.
    if model.spec.model_config["engine"] == "openvino":
        runtimes, required = (
            {"openvino": runtime_of("openvino", model.spec.model_config["dtype"]), **runtimes},
            True,
        )
    try:
        if model.spec.dtype != "float32":
            raise Refusal(f"a graph is served in float32, and this model in {model.spec.dtype}")
        inputs = examples_of(model.task, cast("ModuleEngine", model.engine), rows)
        # Looked for again, after the forwards: one may have put other tensors into the module.
        slots = find_slots(model.module)
        extents, limit = find_extents(inventory, layout), getattr(model.task, "limit", None)
        graph, facts = record(
            model.module,
            slots,
            extents,
            inputs,
            limit=limit,
            one_size=_has_one_size(model.task),
            runtimes=runtimes,
        )
    except Refusal as refusal:
        if required:
            raise StructureError(
                "The forward of the model cannot be stored as a graph",
                where=model.spec.model_class,
                found=refusal,
                hint='save it with graph="auto" and engine="auto", which serves the module where '
                "there is no graph",
            ) from refusal
        write_reason(str(refusal), layout)
        return []  # the module serves, and inspect tells the reason
    write_graph(graph, facts, layout)
    # Read back, with all checks: the golden rows are answered by the very file that is published.
    opened = open_graph(inventory.files, layout)
    return [
        GraphEngine(runtime(*opened, threads=available_cpus())) for runtime in runtimes.values()
    ]
