"""What must not be in a graph: calls and arguments, compared with our table of operators and torch's own schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.graph import DEVICE, GETITEM, MOST_TEXT, Call, Graph, Ref
from mlflow_safeflavor.operators import KEPT_FALSE, SIZES, WITHOUT_DROPOUT, Signature, allowed, signature_of

__all__ = ["MOST_CALLS", "MOST_ITEMS", "find_faults"]

MOST_CALLS = 200_000
MOST_ITEMS = 10_000
"""Of a list, and of the results of a call."""

_NUMBER = "number"


def find_faults(graph: Graph) -> Iterator[str]:
    """What must not be in a graph, one sentence each, naming the call."""
    if len(graph.calls) > MOST_CALLS:
        yield f"{len(graph.calls)} calls, more than {MOST_CALLS}"
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
    if not isinstance(found, (tuple, str)) and found.kind() == "ListType" and 0 <= index < MOST_ITEMS:
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
