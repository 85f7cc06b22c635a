"""``graph.onnx``: a recorded forward, checked before ONNX Runtime sees it.

The file is not trusted. It may hold operators of the standard that compute arrays from arrays, and
nothing else: no subgraph, no function, no operator library, no file but the artifact's own weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_safeflavor.graph.graph import Graph, Input, Weight
from mlflow_safeflavor.graph.initializers import dtype_of, size_of, weights_of
from mlflow_safeflavor.graph.onnx_file import Malformed, parse_model
from mlflow_safeflavor.graph.operators import OPERATORS, check_attributes, check_granted

__all__ = ["read"]

_MOST_NODES = 30_000
# Of the format: before version 4 initializers are inputs, too, which a caller could replace.
_VERSIONS = range(8, 14)
_OPSETS = range(18, 24)


def read(content: bytes) -> Graph:
    """Check a model.

    Raises:
        Malformed: It is no model of ours, or holds what it must not; names the node or tensor.
    """
    graph = _graph_of(parse_model(content))
    inputs = tuple(map(_input, graph["input"]))
    weights = dict(weights_of(graph["initializer"]))
    known = {f"{_IN}{value.name}" for value in inputs}
    if len(known) != len(inputs):
        raise Malformed("two inputs have one name")
    known |= _new(
        known, [tensor.get("name", "") for tensor in graph["initializer"]], "an initializer"
    )
    # Bytes of each value that is known before the first run.
    sizes = {tensor["name"]: size_of(tensor) for tensor in graph["initializer"]}
    nodes = []
    if len(graph["node"]) > _MOST_NODES:
        raise Malformed(f"{len(graph['node'])} nodes")
    for i, node in enumerate(graph["node"]):
        operator = node.get("op_type", "")
        where = f"node {i}, {operator[:40]}"
        if node.get("domain") or operator not in OPERATORS:
            raise Malformed(f"{where}: no operator that a graph may hold")
        # In order, so that there is no circle, and no name that another node gives later.
        if missing := [name for name in node["input"] if name and name not in known]:
            raise Malformed(f"{where}: uses {missing[0][:60]!r}, which nothing before it gives")
        known |= _new(known, [name for name in node["output"] if name], where)
        nodes.append((operator, tuple(node["input"]), tuple(node["output"])))
        check_attributes(node["attribute"], where)
        check_granted(node, where)
        # Of constants alone: ONNX Runtime may compute it, or copy it into each node that uses it.
        if all(name in sizes for name in node["input"] if name):
            own = [size_of(attribute["t"]) for attribute in node["attribute"] if "t" in attribute]
            size = max([0, *own, *(sizes[name] for name in node["input"] if name)])
            sizes.update(dict.fromkeys(filter(None, node["output"]), size))
    return Graph(
        content,
        inputs,
        _outputs(graph["output"], {name for _, _, names in nodes for name in names}),
        weights,
        tuple(nodes),
        _lookups(nodes, weights),
        _reused(nodes, sizes),
    )


# Prefixes of the names of inputs and outputs: a forward may give an output of an input's name.
_IN, _OUT = "input.", "output."


def _graph_of(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The graph of a model in a version of the format and of operators that are known here."""
    if model.get("ir_version") not in _VERSIONS:
        raise Malformed(f"version {model.get('ir_version')} of the format")
    # One, and of the standard's domain, "": what another domain's operators do is not known here.
    opsets = [(entry.get("domain", ""), entry.get("version")) for entry in model["opset_import"]]
    if len(opsets) != 1 or opsets[0][0] or opsets[0][1] not in _OPSETS:
        raise Malformed(
            f"operators of {opsets}, not of the standard's version {_OPSETS[0]} to {_OPSETS[-1]}"
        )
    graph: Mapping[str, Any] | None = model.get("graph")
    if graph is None:
        raise Malformed("no graph")
    return graph


def _outputs(values: Sequence[Mapping[str, Any]], given: set[str]) -> tuple[str, ...]:
    """Names of the outputs as a forward gives them; ``given`` are those that nodes give."""
    outputs = [value.get("name", "") for value in values]
    if not outputs or len(set(outputs)) != len(outputs) or not given.issuperset(outputs):
        raise Malformed("outputs that no node gives")
    if not all(name.startswith(_OUT) for name in outputs):
        raise Malformed("outputs of other names than a save gives")
    for value in values:
        _typed(value, f"output {value['name'][:60]!r}")
    return tuple(name.removeprefix(_OUT) for name in outputs)


def _lookups(
    nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]], weights: Mapping[str, Weight]
) -> dict[str, int]:
    """Input that indexes tables (``Gather``) → rows of the shortest of them."""
    found: dict[str, int] = {}
    for operator, taken, _ in nodes:
        if (
            operator == "Gather"
            and len(taken) == 2
            and taken[0] in weights
            and taken[1].startswith(_IN)
        ):
            name, rows = taken[1].removeprefix(_IN), (*weights[taken[0]].shape, 0)[0]
            found[name] = min(rows, found.get(name, rows))
    return found


def _reused(
    nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]], sizes: Mapping[str, int]
) -> int:
    """Bytes of constants for each use but the first: 200 norms may be fused into 200 copies."""
    uses = Counter(name for _, taken, _ in nodes for name in taken)
    return sum(size * (uses[name] - 1) for name, size in sizes.items() if uses[name])


def _new(known: set[str], names: list[str], where: str) -> set[str]:
    if len(set(names)) != len(names) or "" in names or not known.isdisjoint(names):
        raise Malformed(f"{where}: gives a name that there is already, or none")
    return set(names)


def _input(value: Mapping[str, Any]) -> Input:
    name = value.get("name", "")
    where = f"input {name[:60]!r}"
    if not name.startswith(_IN):
        raise Malformed(f"{where}: another name than a save gives")
    dtype, shape = _typed(value, where)
    if None in shape:
        raise Malformed(f"{where}: a dimension without a size")
    return Input(name.removeprefix(_IN), dtype, tuple(size for size in shape if size is not None))


def _typed(value: Mapping[str, Any], where: str) -> tuple[str, list[int | str | None]]:
    """The dtype and the shape of an input or output; None for a size that is not given."""
    tensor = value.get("type", {}).get("tensor_type", {})
    shape: list[int | str | None] = []
    for size in tensor.get("shape", {}).get("dim", ()):
        if len(size) > 1 or size.get("dim_value", 0) < 0:
            raise Malformed(f"{where}: a dimension with two sizes, or a negative one")
        shape.append(size.get("dim_value", size.get("dim_param")))
    return dtype_of(tensor.get("elem_type"), where), shape
