"""A module's forward recorded as a graph.

``torch.export`` traces it with free sizes; what it finds is written as calls of plain operators. Where that does not
work, or the graph cannot be proven to give the same bits, the reason is kept, and the module serves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from mlflow_safeflavor.faults import find_faults
from mlflow_safeflavor.graph import (
    DEVICE,
    MOST_TEXT,
    Call,
    Constant,
    Graph,
    GraphModule,
    Input,
    Ref,
    refs_of,
)
from mlflow_safeflavor.inventory import STORABLE, Slot, dtype_name
from mlflow_safeflavor.module_engine import ModuleEngine, tensors_of
from mlflow_safeflavor.operators import SIZES
from mlflow_safeflavor.proof import TEXT, Forward, Inputs, Refusal, prove
from mlflow_safeflavor.tasks.base import Row, Task

__all__ = ["Refusal", "examples_of", "record"]


def record(
    module: torch.nn.Module,
    slots: Sequence[Slot],
    examples: Sequence[Inputs],
    *,
    limit: int | None = None,
    alone: bool = False,
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Trace a module's forward, and prove that the graph gives the same bits.

    Args:
        module: As it is served: in eval mode, gradients off.
        slots: Its tensors; constants of the graph that are among them are named by their paths.
        examples: Inputs of its forward, as the task makes them; at least one.
        limit: Most tokens of a text.
        alone: Whether no module will answer beside the graph; then it need not round as torch's one kernel for an
            encoder layer, which no graph does.

    Returns:
        The graph, and the constants that are no tensors of the module, by name.

    Raises:
        Refusal: The forward cannot be traced with free sizes, calls what a graph may not, or gave other bits.
    """
    if len({tuple(sorted(inputs)) for inputs in examples}) != 1:
        raise Refusal("the forward is not always called with the same arguments")
    reasons = []
    for example, free in product(_candidates(examples), _freedoms(examples)):
        try:
            with _plain_attention():
                graph, own = _Tracer(module, slots, example, free).graph()
            graph = _tied(graph, examples)
            if fault := next(find_faults(graph), None):
                raise Refusal(fault)
            with _plain_attention() if alone else nullcontext():
                return prove(module, graph, own, slots, example, limit), own
        except Refusal as refusal:
            reasons.append(str(refusal))
    raise Refusal(reasons[0])


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the one kernel that torch takes for an encoder layer in eval mode, which rounds as no graph does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Listener:
    """An engine that remembers with what it called the forward."""

    name = "listener"

    def __init__(self, engine: ModuleEngine) -> None:
        self.engine, self.on_cpu = engine, engine.on_cpu
        self.heard: list[Inputs] = []

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.heard.append(tensors_of(inputs, self.engine.device, self.engine.dtype))
        return self.engine(inputs)

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        raise Refusal("the model writes text token by token, with a cache that grows: that is no single forward")


def examples_of(task: Task, engine: ModuleEngine, rows: Sequence[Row]) -> list[Inputs]:
    """What a task gives to the engine for these rows: all in one batch, and the first two alone.

    Raises:
        Refusal: It has no forward of its own.
    """
    params = task.check_params(task.golden(task.config))
    pieces = [piece for row in task.uncapped.encoded(rows, params) for piece in task.pieces(row)]
    listener = _Listener(engine)
    for batch in (pieces, *([piece] for piece in pieces[:2])):
        task.forward(listener, batch, params)
    return listener.heard


# --- trace ---------------------------------------------------------------------------------------

_ASSERTS = ("aten._assert_", "aten.sym_constrain_range")
_SAME = frozenset(("aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default"))
_DROPOUTS = frozenset(("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"))
_CASTS = frozenset(("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default"))
_MOST_FOLDED = 1 << 20
"""Bytes of a folded constant: a table of positions, not a weight."""


def _candidates(examples: Sequence[Inputs]) -> Iterator[Inputs]:
    """Inputs to trace with, the best first: sizes of 0 and 1 cannot become free."""
    largest = max(examples, key=lambda inputs: sum(tensor.numel() for tensor in inputs.values()))
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in largest.values()):
        yield {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in largest.items()}
    yield largest


def _freedoms(examples: Sequence[Inputs]) -> list[Mapping[str, set[int]]]:
    """Dimensions to be free, by input: all of them; then rows, lengths and what differed between the examples."""
    every = {name: set(range(tensor.dim())) for name, tensor in examples[0].items()}
    some = {
        name: {i for i in dims if i == 0 or (name in TEXT and i == 1) or len({e[name].shape[i] for e in examples}) > 1}
        for name, dims in every.items()
    }
    return [every] if some == every else [every, some]


def _export(module: torch.nn.Module, example: Inputs, dims: Mapping[str, set[int]]) -> torch.export.ExportedProgram:
    auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    free = {name: {i: auto if i in dims[name] else static for i in range(t.dim())} for name, t in example.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Forward(module), (dict(example),), dynamic_shapes=(free,), strict=False)
            if any(_is_mutable(node.target) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:  # torch.export has no end of ways to fail
        raise Refusal(f"torch.export: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    return program


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


class _Tracer:
    """Turns what ``torch.export`` found into calls; see ``record``."""

    def __init__(
        self, module: torch.nn.Module, slots: Sequence[Slot], example: Inputs, free: Mapping[str, set[int]]
    ) -> None:
        self.example = example
        self.program = _export(module, example, free)
        self.module = module
        self.paths = {_place(slot.tensor): slot.path for slot in reversed(slots) if slot.tensor.numel()}
        self.values: dict[Any, Any] = {}
        self.constants: list[Constant] = []
        self.tensors: list[torch.Tensor] = []
        self.own: dict[str, torch.Tensor] = {}
        self.calls: list[Call] = []
        self.known: dict[str, Ref] = {}

    def graph(self) -> tuple[Graph, dict[str, torch.Tensor]]:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise Refusal("the forward changes its buffers or inputs")
        inputs: list[Input] = []
        kinds = {spec.arg.name: spec for spec in signature.input_specs}
        names = iter(self.example)
        outputs: list[Any] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and kinds[node.name].kind.name == "USER_INPUT":
                self.values[node] = Ref("input", len(inputs))
                shape = tuple(map(self._size, node.meta["val"].shape))
                inputs.append(Input(next(names), dtype_name(node.meta["val"].dtype), shape))
            elif node.op == "placeholder":
                self.values[node] = self._constant(kinds[node.name], used=bool(node.users))
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                outputs = [self._value(value) for value in node.args[0]]
            else:
                raise Refusal(f"the traced forward has a node of kind {node.op}")
        with torch.no_grad():
            wanted = Forward(self.module)(dict(self.example))
        if len(wanted) != len(outputs) or not all(isinstance(output, Ref) for output in outputs):
            raise Refusal("the traced forward gives other outputs")
        graph = Graph(
            inputs=tuple(inputs),
            sizes=self._bounds(inputs),
            constants=tuple(self.constants),
            calls=tuple(self.calls),
            outputs=dict(zip(wanted, outputs, strict=True)),
            facts={},
        )
        return _pruned(graph, self.own)

    def _size(self, size: Any) -> int | str:
        """A name only for what is free: the forward may have fixed a size, or bound it to others (twice another)."""
        if isinstance(size, int):
            return size
        return str(size.node.expr) if size.node.expr.is_symbol else int(size.node.hint)

    def _bounds(self, inputs: Sequence[Input]) -> dict[str, tuple[int, int | None]]:
        """Sizes of 1 are proven like all others, although the tracer takes 2 for the least it knows of."""
        found = {str(symbol): bounds for symbol, bounds in self.program.range_constraints.items()}
        sizes: dict[str, tuple[int, int | None]] = {}
        for size in (size for known in inputs for size in known.shape if isinstance(size, str)):
            bounds = found.get(size)
            least, most = (int(bounds.lower), bounds.upper) if bounds else (1, None)
            most = int(most) if most is not None and most.is_finite and most < 2**31 else None
            sizes[size] = (1 if least <= 2 else least, most)
        return sizes

    def _constant(self, spec: Any, *, used: bool) -> Any:
        if not used:
            return None
        tensor = {**self.program.state_dict, **self.program.constants}.get(spec.target)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in STORABLE:
            raise Refusal(f"{spec.target} is a {type(tensor).__name__} that no safetensors file holds")
        return self._stored(tensor.detach())

    def _stored(self, tensor: torch.Tensor) -> Ref:
        path = self.paths.get(_place(tensor))
        name = f"constant_{len(self.own)}" if path is None else path
        if path is None:
            self.own[name] = tensor.clone()
        entry = Constant(name, path is None, dtype_name(tensor.dtype), tuple(tensor.shape))
        if entry not in self.constants:
            self.constants.append(entry)
            self.tensors.append(tensor)
        return Ref("constant", self.constants.index(entry))

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, (list, tuple)):
            return [self._value(item) for item in value]
        if isinstance(value, torch.device):
            return DEVICE
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise Refusal("a size that the graph does not compute")
        return value

    def _call(self, node: torch.fx.Node) -> Any:
        name = _name_of(node.target)
        args = self._value(node.args)
        if name.startswith(_ASSERTS):
            return None
        if name in _SAME or (name in _DROPOUTS and args[2] is False) or (name in _CASTS and _changes_nothing(node)):
            return args[0]
        kwargs = {key: self._value(value) for key, value in node.kwargs.items()}
        call = Call(name, tuple(args), kwargs, _note(node.meta.get("val")))
        key = repr((name, args, kwargs))
        if key not in self.known:
            self.known[key] = self._folded(call) or Ref("call", len(self.calls))
            if self.known[key] == Ref("call", len(self.calls)):
                self.calls.append(call)
        return self.known[key]

    def _folded(self, call: Call) -> Ref | None:
        """The result of a call that depends on nothing, as a constant."""
        refs = list(refs_of(call))
        if call.operator in SIZES or any(ref.kind != "constant" or not self.constants[ref.index].own for ref in refs):
            return None
        alone = Graph((), {}, tuple(self.constants), (call,), {"it": Ref("call", 0)}, {})
        if next(find_faults(alone), None):
            return None
        with torch.no_grad():
            result = GraphModule(alone, self.tensors)()["it"]
        small = result.nbytes <= _MOST_FOLDED and result.is_contiguous()
        return self._stored(result) if small and result.dtype in STORABLE else None


def _note(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    return str(value) if isinstance(value, (torch.SymInt, int)) else ""


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "").removeprefix("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _changes_nothing(node: torch.fx.Node) -> bool:
    """Whether a cast gives its argument back, as torch does where nothing has to change."""
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    asked = [*node.args[2:], *node.kwargs.values()]
    forced = any(value is True or isinstance(value, torch.memory_format) for value in asked)
    return before.dtype == after.dtype and before.device == after.device and not forced


def _pruned(graph: Graph, own: dict[str, torch.Tensor]) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Without the calls and constants that no output needs."""
    needed: set[Ref] = set()
    waiting = list(graph.outputs.values())
    while waiting:
        ref = waiting.pop()
        if ref not in needed:
            needed.add(ref)
            waiting += refs_of(graph.calls[ref.index]) if ref.kind == "call" else []
    order = sorted(needed, key=lambda ref: ref.index)
    kept = {kind: [ref for ref in order if ref.kind == kind] for kind in ("constant", "call")}
    places = {kind: {ref: Ref(kind, i) for i, ref in enumerate(refs)} for kind, refs in kept.items()}

    def moved(value: Any) -> Any:
        if isinstance(value, Ref):
            return places[value.kind][value] if value.kind in places else value
        return [moved(item) for item in value] if isinstance(value, (list, tuple)) else value

    constants = tuple(graph.constants[ref.index] for ref in kept["constant"])
    names = {constant.tensor for constant in constants if constant.own}
    calls = tuple(
        replace(call, args=tuple(moved(call.args)), kwargs={name: moved(value) for name, value in call.kwargs.items()})
        for call in (graph.calls[ref.index] for ref in kept["call"])
    )
    outputs = {name: moved(ref) for name, ref in graph.outputs.items()}
    pruned = replace(graph, constants=constants, calls=calls, outputs=outputs)
    return pruned, {name: tensor for name, tensor in own.items() if name in names}


def _tied(graph: Graph, examples: Sequence[Inputs]) -> Graph:
    """Sizes that were equal in all examples are one: the tracer leaves apart what broadcasting would allow.

    Raises:
        Refusal: A size that differs between the examples is not free.
    """
    sizes = {
        (known.name, i): tuple(inputs[known.name].shape[i] for inputs in examples)
        for known in graph.inputs
        for i in range(len(known.shape))
    }
    texts = {sizes[k.name, 1] for k in graph.inputs if k.name in TEXT and len(k.shape) == 2}
    names: dict[Any, str] = {}
    inputs = []
    for known in graph.inputs:
        shape = list(known.shape)
        for i, size in enumerate(shape):
            seen = sizes[known.name, i]
            if isinstance(size, int) and len(set(seen)) > 1:
                raise Refusal(f"the forward takes one size of {known.name} only, in dimension {i}: {size}")
            if isinstance(size, str):
                # Boxes of words are as many as the words.
                text = (known.name in TEXT and len(shape) == 2) or (seen in texts and len(set(seen)) > 1)
                key = "rows" if i == 0 else "length" if text else seen if len(set(seen)) > 1 else size
                shape[i] = names.setdefault(key, key if isinstance(key, str) else size)
        inputs.append(Input(known.name, known.dtype, tuple(shape)))
    bounds: dict[str, tuple[int, int | None]] = {}
    renamed: dict[str, str] = {}
    for before, after in zip(graph.inputs, inputs, strict=True):
        for old, new in zip(before.shape, after.shape, strict=True):
            if isinstance(old, str) and isinstance(new, str):
                renamed[old] = new
                bounds[new] = _both(graph.sizes[old], bounds.get(new))
    calls = tuple(replace(call, note=_renamed(call.note, renamed)) for call in graph.calls)
    return replace(graph, inputs=tuple(inputs), sizes=bounds, calls=calls)


def _renamed(note: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), note)[:MOST_TEXT]


def _both(one: tuple[int, int | None], other: tuple[int, int | None] | None) -> tuple[int, int | None]:
    if other is None:
        return one
    most = [bound for bound in (one[1], other[1]) if bound is not None]
    return max(one[0], other[0]), min(most, default=None)
