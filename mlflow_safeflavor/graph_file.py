"""``graph.json``: a graph written and read.

The file is not trusted. Its names are looked up in tables of ours (``operators``), every argument is compared with the
operator's own schema (``faults``), a call may only use what came before it, and constants are tensors of the artifact
with the recorded dtype and shape. Nothing of the file is evaluated or becomes part of a name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from mlflow_safeflavor.artifact import WAY_OUT, Layout, write_json
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.faults import MOST_CALLS, MOST_ITEMS, find_faults
from mlflow_safeflavor.graph import DEVICE, MOST_TEXT, Call, Constant, Graph, Input, Ref
from mlflow_safeflavor.inventory import STORABLE, Inventory, dtype_name, realise
from mlflow_safeflavor.tensors import read_constants, read_tensors, write_constants

__all__ = ["from_json", "read_graph", "to_json", "write_graph", "write_reason"]

_VERSION = 1
_DEEPEST = 4
_PLAIN_TEXT = re.compile(r"[a-z0-9_ ,.>-]*", re.ASCII)
"""Modes, paddings and the equations of einsum."""


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
    graph = from_json(layout.read_json(layout.graph))
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
            way_out=WAY_OUT,
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
        constants=tuple(_constant(entry) for entry in _list(content["constants"], MOST_CALLS)),
        calls=tuple(_call(entry) for entry in _list(content["calls"], MOST_CALLS)),
        outputs={_text(name): _ref(value) for name, value in _dict(content["outputs"]).items()},
        facts=_dict(content["facts"]),
    )


def _list(value: Any, most: int = MOST_ITEMS) -> list[Any]:
    if type(value) is not list or len(value) > most:
        raise ValueError(f"wanted a list of at most {most}")
    return value


def _dict(value: Any, keys: set[str] | None = None) -> dict[str, Any]:
    if type(value) is not dict or len(value) > MOST_ITEMS or (keys is not None and value.keys() != keys):
        raise ValueError(f"wanted an object{f' with {sorted(keys)}' if keys else ''}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MOST_ITEMS:
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
