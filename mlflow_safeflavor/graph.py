"""A forward as data: calls of plain operators on tensors, read from JSON, checked, and run as one function.

The file is not trusted. Its names are looked up in tables of ours (``operators``), every argument is compared with the
operator's own schema, a call may only use what came before it, and constants are tensors of the artifact with the
recorded dtype and shape. Nothing of the file is evaluated or becomes part of a name.
"""

from __future__ import annotations

import json
import math
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mlflow_safeflavor.allowance import Allowance, TooMuch
from mlflow_safeflavor.artifact import WAY_OUT, Layout, read_json, write_json
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.inventory import STORABLE, Inventory, dtype_name, realise
from mlflow_safeflavor.operators import KEPT_FALSE, SIZES, WITHOUT_DROPOUT, Signature, allowed, signature_of
from mlflow_safeflavor.tensors import read_constants, read_tensors, write_constants

__all__ = [
    "DEVICE",
    "GETITEM",
    "MOST_TEXT",
    "Call",
    "Constant",
    "Graph",
    "GraphModule",
    "Input",
    "Ref",
    "describe_input",
    "find_faults",
    "from_json",
    "lines_of",
    "read_graph",
    "refs_of",
    "to_json",
    "write_graph",
    "write_reason",
]

_VERSION = 1
_MOST_CALLS = 200_000
_MOST_ITEMS = 10_000
MOST_TEXT = 200
"""Characters of a text that is an argument, or of a note."""
_DEEPEST = 4
_PLAIN_TEXT = re.compile(r"[a-z0-9_ ,.>-]*", re.ASCII)
"""Modes, paddings and the equations of einsum."""


@dataclass(frozen=True)
class Ref:
    """Something that a call uses.

    Attributes:
        kind: ``input``, ``constant`` or ``call``.
        index: Its place in that list.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Input:
    """An argument of the forward.

    Attributes:
        name: As the task gives it.
        dtype: Like ``int64``.
        shape: Sizes; a text for one that may be any: equal texts are equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor of the artifact.

    Attributes:
        tensor: Path in the inventory, or a name in ``graph.safetensors``.
        own: Whether it is in ``graph.safetensors``: the model itself has no such tensor.
        dtype: Like ``float32``.
        shape: Sizes.
    """

    tensor: str
    own: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operator with its arguments: values, ``Ref`` and lists of them.

    Attributes:
        operator: Full name, like ``aten.linear.default``; see ``operators``.
        args: By position.
        kwargs: By name.
        note: What came out when it was recorded, like ``float32[rows, length, 384]``; for people, checked by nobody.
    """

    operator: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    note: str = ""


class _Device:
    """Stands for the device that the graph runs on, whichever it was recorded on."""

    def __repr__(self) -> str:
        return "device"


DEVICE = _Device()


@dataclass(frozen=True)
class Graph:
    """A forward.

    Attributes:
        inputs: What it takes.
        sizes: Name of a size → the least and the most it may be; None for no bound.
        constants: What it uses of the artifact.
        calls: In the order in which they run; none uses a later one.
        outputs: Name → what is returned under it.
        facts: What is known of it and changes nothing: on how many inputs it was proven, by which torch it was made.
    """

    inputs: tuple[Input, ...]
    sizes: Mapping[str, tuple[int, int | None]]
    constants: tuple[Constant, ...]
    calls: tuple[Call, ...]
    outputs: Mapping[str, Ref]
    facts: Mapping[str, Any]

    def misfit(self, inputs: Mapping[str, torch.Tensor]) -> str | None:
        """What keeps the graph from running on these inputs, in words; None if nothing does."""
        if inputs.keys() != {known.name for known in self.inputs}:
            return f"arguments {sorted(inputs)}, not {sorted(known.name for known in self.inputs)}"
        found: dict[str, int] = {}
        for known in self.inputs:
            tensor = inputs[known.name]
            right = dtype_name(tensor.dtype) == known.dtype and tensor.dim() == len(known.shape)
            for size, wanted in zip(tensor.shape, known.shape, strict=False):
                least, most = (wanted, wanted) if isinstance(wanted, int) else self.sizes[wanted]
                right &= size == (found.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
                right &= least <= size and (most is None or size <= most)
            if not right:
                return f"{known.name} {dtype_name(tensor.dtype)}{list(tensor.shape)}, not {describe_input(known)}"
        return None


def describe_input(known: Input | Constant) -> str:
    """``int64[rows, length]``."""
    return f"{known.dtype}[{', '.join(map(str, known.shape))}]"


def lines_of(graph: Graph) -> Iterator[str]:
    """The graph to be read: one line an input, a constant that is used, a call and an output."""
    words = {
        **{Ref("input", i): known.name for i, known in enumerate(graph.inputs)},
        **{Ref("constant", i): known.tensor for i, known in enumerate(graph.constants)},
        **{Ref("call", i): f"%{i}" for i in range(len(graph.calls))},
    }

    def word(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(word, value))}]"
        return words[value] if isinstance(value, Ref) else str(value)

    for name, (least, most) in graph.sizes.items():
        yield f"size {name}: {least} to {'any' if most is None else most}"
    for known in graph.inputs:
        yield f"input {known.name}: {describe_input(known)}"
    for constant in graph.constants:
        yield f"constant {constant.tensor}: {describe_input(constant)}"
    for i, call in enumerate(graph.calls):
        arguments = [*map(word, call.args), *(f"{name}={word(value)}" for name, value in call.kwargs.items())]
        yield f"%{i} = {call.operator}({', '.join(arguments)}){f'  → {call.note}' if call.note else ''}"
    for name, ref in graph.outputs.items():
        yield f"output {name}: {words[ref]}"


# --- as a function -------------------------------------------------------------------------------


class GraphModule(torch.nn.Module):
    """A graph with its constants, as a module whose forward takes the graph's inputs by name.

    Args:
        graph: Checked, as ``from_json`` returns it.
        constants: As many tensors as ``graph.constants``; only read, never written.
        device: Where it runs; constants are moved there.
    """

    def __init__(self, graph: Graph, constants: Sequence[torch.Tensor], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.graph = graph
        self.constants = [tensor.to(device) for tensor in constants]
        self._run = _as_function(graph, self.constants, torch.device(device))
        self._most_bytes: int | None = None
        self.eval()

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph.

        Raises:
            StructureError: It was not made for such inputs.
        """
        if misfit := self.graph.misfit(inputs):
            raise StructureError(
                "The model was stored as a graph, which does not take this input",
                where="forward",
                wanted=", ".join(f"{known.name} {describe_input(known)}" for known in self.graph.inputs),
                found=misfit,
                way_out='save the model with its module, too: structure="auto"',
            )
        try:
            with nullcontext() if self._most_bytes is None else Allowance(self._most_bytes):
                results = self._run(*(inputs[known.name] for known in self.graph.inputs))
        except TooMuch as error:
            raise StructureError(
                "The graph of the model wants far more memory than its weights take",
                where=f"graph.json, {self._call_of(error)}",
                wanted=f"at most {self._most_bytes:,} bytes at once",
                found=error,
                way_out=WAY_OUT,
            ) from None
        return dict(zip(self.graph.outputs, results, strict=True))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """While a graph that nobody has run yet is tried: no run may hold far more memory than the weights take."""
        self._most_bytes = 8 * sum(tensor.nbytes for tensor in self.constants) + 2**30
        try:
            yield
        finally:
            self._most_bytes = None

    def _call_of(self, error: BaseException) -> str:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is self._run.__code__]
        i = lines[0] - _FIRST_LINE
        return f"call {i}, {self.graph.calls[i].operator}"


_FIRST_LINE = 2
"""Of the function below: call 0 is there, and each later call on a line of its own."""


def _as_function(graph: Graph, constants: Sequence[torch.Tensor], device: torch.device) -> Callable[..., Any]:
    """One Python function, so that a call costs no more than the operator; every name in it is ours, by number.

    What is not needed any more is let go at once, as in a module's forward.
    """
    space: dict[str, Any] = {f"c{i}": tensor for i, tensor in enumerate(constants)}
    names = {"input": "x", "constant": "c", "call": "v"}

    def source(value: Any) -> str:
        if isinstance(value, Ref):
            return f"{names[value.kind]}{value.index}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(source, value))}]"
        name = f"k{len(space)}"
        space[name] = device if value is DEVICE else value
        return name

    last = {ref: i for i, call in enumerate(graph.calls) for ref in refs_of(call)}
    kept = set(graph.outputs.values())
    lines = [f"def run({', '.join(f'x{i}' for i in range(len(graph.inputs)))}):"]
    for i, call in enumerate(graph.calls):
        space[f"o{i}"] = _function(call.operator)
        keywords = [f"{name}={source(call.kwargs[name])}" for name in _names_of_torch(call)]
        lines.append(f" v{i} = o{i}({', '.join([*map(source, call.args), *keywords])})")
        done = {source(ref) for ref in refs_of(call) if ref.kind == "call" and last[ref] == i and ref not in kept}
        lines[-1] += f"; del {', '.join(sorted(done))}" if done else ""
    lines.append(f" return [{', '.join(source(ref) for ref in graph.outputs.values())}]")
    exec("\n".join(lines), space)  # noqa: S102  (x, c, v, k and o with numbers of ours; see above)
    run: Callable[..., Any] = space["run"]
    return run


def _function(name: str) -> Callable[..., Any]:
    if name == GETITEM:
        return operator.getitem
    signature = signature_of(name)
    return SIZES[name] if signature is None else signature.call


def _names_of_torch(call: Call) -> Iterator[str]:
    """Names of a call's keyword arguments, as torch's schema spells them and not the file."""
    signature = signature_of(call.operator) if call.kwargs else None
    return (name for name in (signature.arguments if signature else ()) if name in call.kwargs)


def refs_of(call: Call) -> Iterator[Ref]:
    """What a call uses."""

    def walk(value: Any) -> Iterator[Ref]:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    yield from walk([*call.args, *call.kwargs.values()])


# --- what is allowed -----------------------------------------------------------------------------

GETITEM = "operator.getitem"
"""Takes one of the results of a call that has several."""

_NUMBER = "number"


def find_faults(graph: Graph) -> Iterator[str]:
    """What must not be in a graph, one sentence each, naming the call."""
    if len(graph.calls) > _MOST_CALLS:
        yield f"{len(graph.calls)} calls, more than {_MOST_CALLS}"
        return
    results: list[Any] = []
    for i, call in enumerate(graph.calls):
        try:
            results.append(_result_of(call, graph, results))
        except (ValueError, TypeError) as error:
            yield f"call {i}, {call.operator[:MOST_TEXT]}: {error}"
            return  # what the later ones use is unknown
    for name, ref in graph.outputs.items():
        try:
            if not _is_tensor(_type_of(ref, graph, results)):
                yield f"output {name[:MOST_TEXT]}: is no tensor"
        except ValueError as error:
            yield f"output {name[:MOST_TEXT]}: {error}"


def _result_of(call: Call, graph: Graph, results: Sequence[Any]) -> Any:
    """Type of what a call gives. Raises ``ValueError`` for what must not be called."""
    if call.operator == GETITEM:
        return _item_of(call, graph, results)
    if call.operator in SIZES:
        if call.kwargs or not 1 <= len(call.args) <= 2:
            raise ValueError("takes one or two numbers")
        for value in call.args:
            if not _is_number(value, graph, results):
                raise ValueError(f"{value!r} is no number")
        return _NUMBER
    signature = signature_of(call.operator) if allowed(call.operator) else None
    if signature is None:
        raise ValueError("is not an operator that a graph may call, with this torch")
    _check_arguments(call, signature, graph, results)
    return signature.results


def _item_of(call: Call, graph: Graph, results: Sequence[Any]) -> Any:
    if call.kwargs or len(call.args) != 2 or not isinstance(call.args[0], Ref) or type(call.args[1]) is not int:
        raise ValueError("takes a result and a number")
    found, index = _type_of(call.args[0], graph, results), call.args[1]
    if isinstance(found, tuple) and 0 <= index < len(found):
        return found[index]
    if not isinstance(found, (tuple, str)) and found.kind() == "ListType" and 0 <= index < _MOST_ITEMS:
        return found.getElementType()
    raise ValueError(f"there is no item {index}")


def _check_arguments(call: Call, signature: Signature, graph: Graph, results: Sequence[Any]) -> None:
    names = list(signature.arguments)[: signature.positional]
    if len(call.args) > len(names):
        raise ValueError(f"takes {len(names)} arguments by position, not {len(call.args)}")
    given = dict(zip(names, call.args, strict=False))
    if twice := given.keys() & call.kwargs.keys():
        raise ValueError(f"{sorted(twice)[0]} is given twice")
    given |= call.kwargs
    if unknown := given.keys() - signature.arguments.keys():
        raise ValueError(f"has no argument {sorted(unknown)[0][:MOST_TEXT]!r}")
    if missing := signature.required - given.keys():
        raise ValueError(f"needs {sorted(missing)[0]}")
    if call.operator in WITHOUT_DROPOUT and given.get("dropout_p", 0) not in (0, 0.0):
        raise ValueError("drops values at random")
    for name, why in (KEPT_FALSE.get(call.operator) or {}).items():
        if given.get(name) is not False and any(given.get(written) is not None for written in why):
            raise ValueError(f"{name} must be false, or it writes to {', '.join(why)}")
    for name, value in given.items():
        wanted = signature.arguments[name]
        if not _fits(value, wanted, graph, results):
            raise ValueError(f"{name} must be {wanted}, not {value!r:.{MOST_TEXT}}")


def _fits(value: Any, wanted: Any, graph: Graph, results: Sequence[Any]) -> bool:
    """Whether a value is of a type of torch's schemas."""
    kind = wanted.kind()
    if kind == "OptionalType":
        return value is None or _fits(value, wanted.getElementType(), graph, results)
    if isinstance(value, Ref):
        found = _type_of(value, graph, results)
        if kind == "TensorType":
            return _is_tensor(found) or _is_number(value, graph, results)
        if kind == "ListType" and not isinstance(found, (tuple, str)):
            return str(found) == str(wanted)
        return kind in ("IntType", "SymIntType", "FloatType", "NumberType", "BoolType") and _is_number(
            value, graph, results
        )
    if kind == "ListType":
        element = wanted.getElementType()
        return isinstance(value, (list, tuple)) and all(_fits(item, element, graph, results) for item in value)
    kinds = _VALUES.get("DeviceObjType" if value is DEVICE else type(value).__name__, ())
    return kind in kinds


_VALUES: Mapping[str, tuple[str, ...]] = {
    "bool": ("BoolType", "NumberType"),
    "int": ("IntType", "SymIntType", "FloatType", "NumberType", "TensorType"),
    "float": ("FloatType", "NumberType", "TensorType"),
    "str": ("StringType",),
    "dtype": ("ScalarTypeType",),
    "layout": ("LayoutType",),
    "memory_format": ("MemoryFormatType",),
    "DeviceObjType": ("DeviceObjType",),
}
"""Type of a value → the types of torch's schemas that it may stand for."""


def _type_of(ref: Ref, graph: Graph, results: Sequence[Any]) -> Any:
    known = {"input": graph.inputs, "constant": graph.constants, "call": results}[ref.kind]
    if not 0 <= ref.index < len(known):
        raise ValueError(f"there is no {ref.kind} {ref.index} before it")
    return results[ref.index] if ref.kind == "call" else "Tensor"


def _is_tensor(found: Any) -> bool:
    return not isinstance(found, tuple) and str(found) == "Tensor"


def _is_number(value: Any, graph: Graph, results: Sequence[Any]) -> bool:
    if isinstance(value, Ref):
        found = _type_of(value, graph, results)
        return not isinstance(found, tuple) and str(found) in (_NUMBER, "int", "float", "bool", "SymInt", "number")
    return type(value) in (int, float, bool)


# --- files ---------------------------------------------------------------------------------------


def write_graph(graph: Graph, constants: Mapping[str, torch.Tensor], layout: Layout) -> None:
    """Write ``graph.json``, a call a line, and ``graph.safetensors`` with constants that the model lacks."""
    content = to_json(graph)
    calls = ",\n".join(json.dumps(call, allow_nan=False) for call in content.pop("calls"))
    head = json.dumps(content, indent=1, sort_keys=False, allow_nan=False)
    layout.graph.write_text(f'{head.removesuffix("}").rstrip()},\n "calls": [\n{calls}\n ]\n}}\n', encoding="utf-8")
    if constants:
        write_constants(constants, layout)


def write_reason(reason: str, layout: Layout) -> None:
    """Write why there is no graph, in its place."""
    write_json(layout.graph, {"version": _VERSION, "reason": reason})


def read_graph(inventory: Inventory, layout: Layout) -> tuple[Graph, list[torch.Tensor]]:
    """Read and check a graph, and find its constants; nothing is copied.

    Raises:
        StructureError: It is not one that may be run.
        IntegrityError: A constant is missing, or has another dtype or shape.
    """
    graph = from_json(read_json(layout.graph))
    tensors = realise(inventory, read_tensors(inventory, layout))
    own = read_constants(layout)
    constants = []
    for i, known in enumerate(graph.constants):
        tensor = (own if known.own else tensors).get(known.tensor)
        found = None if tensor is None else (dtype_name(tensor.dtype), tuple(tensor.shape))
        if tensor is None or found != (known.dtype, known.shape):
            raise IntegrityError(
                "A constant of the graph is not in the artifact",
                where=f"{layout.name_of(layout.graph)}, constant {i}, {known.tensor[:MOST_TEXT]}",
                wanted=f"{known.dtype}{list(known.shape)}",
                found="no such tensor" if found is None else f"{found[0]}{list(found[1])}",
                way_out=WAY_OUT,
            )
        constants.append(tensor)
    return graph, constants


# --- as JSON -------------------------------------------------------------------------------------


def to_json(graph: Graph) -> dict[str, Any]:
    """``graph.json``; ``from_json`` reads it back."""
    return {
        "version": _VERSION,
        "facts": dict(graph.facts),
        "inputs": [{"name": known.name, "dtype": known.dtype, "shape": list(known.shape)} for known in graph.inputs],
        "sizes": {name: list(bounds) for name, bounds in graph.sizes.items()},
        "constants": [
            {"tensor": known.tensor, "own": known.own, "dtype": known.dtype, "shape": list(known.shape)}
            for known in graph.constants
        ],
        "calls": [
            [
                call.operator,
                _value_to_json(call.args),
                {name: _value_to_json(v) for name, v in call.kwargs.items()},
                call.note,
            ]
            for call in graph.calls
        ],
        "outputs": {name: _value_to_json(ref) for name, ref in graph.outputs.items()},
    }


_NAMED = {
    "dtype": {dtype_name(dtype): dtype for dtype in STORABLE},
    "layout": {"strided": torch.strided},
    "memory_format": {
        str(known).removeprefix("torch."): known
        for known in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "device": {"here": DEVICE},
}
"""Values that JSON has no word for, by kind and name."""


def _value_to_json(value: Any) -> Any:
    """Raises ``ValueError`` for what a graph cannot hold."""
    if isinstance(value, Ref):
        return {value.kind: value.index}
    if isinstance(value, (list, tuple)):
        return [_value_to_json(item) for item in value]
    if isinstance(value, str):
        return {"text": value}
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    for kind, known in _NAMED.items():
        for name, meant in known.items():
            same = isinstance(value, float) and repr(value) == name if kind == "float" else value is meant
            if same:
                return {kind: name}
    raise ValueError(f"{value!r} cannot be written")


def from_json(content: Any) -> Graph:
    """Read a graph, and refuse whatever must not be in one.

    Args:
        content: JSON of any kind.

    Raises:
        StructureError: It is no graph, or calls what it must not; names the call.
    """
    try:
        graph = _read(content)
        fault = next(find_faults(graph), None)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise StructureError(
            "The graph of the model is not one that may be run",
            where="graph.json",
            found=fault[:1000],
            way_out="fetch the artifact again; an operator that this torch lacks is in the pinned one",
        )
    return graph


def _read(content: Any) -> Graph:
    keys = {"version", "facts", "inputs", "sizes", "constants", "calls", "outputs"}
    if not isinstance(content, dict) or content.keys() != keys or content["version"] != _VERSION:
        raise ValueError(f"wanted version {_VERSION} with {', '.join(sorted(keys))}")
    sizes = {_text(name): _bounds(bounds) for name, bounds in _dict(content["sizes"]).items()}
    return Graph(
        inputs=tuple(_input(entry, sizes) for entry in _list(content["inputs"])),
        sizes=sizes,
        constants=tuple(_constant(entry) for entry in _list(content["constants"], _MOST_CALLS)),
        calls=tuple(_call(entry) for entry in _list(content["calls"], _MOST_CALLS)),
        outputs={_text(name): _ref(value) for name, value in _dict(content["outputs"]).items()},
        facts=_dict(content["facts"]),
    )


def _list(value: Any, most: int = _MOST_ITEMS) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise ValueError(f"wanted a list of at most {most}")
    return value


def _dict(value: Any, keys: set[str] | None = None) -> dict[str, Any]:
    if type(value) is not dict or len(value) > _MOST_ITEMS or (keys is not None and value.keys() != keys):
        raise ValueError(f"wanted an object{f' with {sorted(keys)}' if keys else ''}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > _MOST_ITEMS:
        raise ValueError("wanted a text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"{value!r:.{MOST_TEXT}} is no 64-bit number")
    return value


def _size(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError(f"{value} is no size")
    return int(value)


def _bounds(value: Any) -> tuple[int, int | None]:
    least, most = _list(value)
    return _size(least), None if most is None else _size(most)


def _dtype(value: Any) -> str:
    if _text(value) not in _NAMED["dtype"]:
        raise ValueError(f"{value[:MOST_TEXT]!r} is no dtype")
    return str(value)


def _input(entry: Any, sizes: Mapping[str, Any]) -> Input:
    entry = _dict(entry, {"name", "dtype", "shape"})
    shape = tuple(size if type(size) is str and size in sizes else _size(size) for size in _list(entry["shape"]))
    return Input(_text(entry["name"]), _dtype(entry["dtype"]), shape)


def _constant(entry: Any) -> Constant:
    entry = _dict(entry, {"tensor", "own", "dtype", "shape"})
    if type(entry["own"]) is not bool:
        raise ValueError("own is no truth value")
    shape = tuple(map(_size, _list(entry["shape"])))
    return Constant(_text(entry["tensor"]), entry["own"], _dtype(entry["dtype"]), shape)


def _call(entry: Any) -> Call:
    name, args, kwargs, note = _list(entry)
    arguments = {_text(name): _value(value) for name, value in _dict(kwargs).items()}
    return Call(_text(name), tuple(_value(value) for value in _list(args)), arguments, _text(note))


def _value(value: Any, depth: int = 0) -> Any:
    if value is None or type(value) in (bool, float):
        return value
    if type(value) is int:
        return _whole(value)
    if type(value) is list and depth < _DEEPEST:
        return [_value(item, depth + 1) for item in _list(value)]
    ((kind, name),) = _dict(value).items()
    if kind in ("input", "constant", "call"):
        return Ref(kind, _size(name))
    if kind == "text" and type(name) is str and len(name) <= MOST_TEXT and _PLAIN_TEXT.fullmatch(name):
        return name
    return _NAMED[kind][_text(name)]


def _ref(value: Any) -> Ref:
    found = _value(value)
    if not isinstance(found, Ref):
        raise ValueError("wanted a reference")
    return found
