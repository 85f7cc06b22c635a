"""``graph.onnx``: a recorded forward, checked before ONNX Runtime sees it.

The file is not trusted. It may hold operators of the standard that compute arrays from arrays, and nothing else: no
subgraph, no function, no operator library, no file but the artifact's own weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_safeflavor.artifact.inventory_file import ITEM_SIZES
from mlflow_safeflavor.graph.onnx_file import Malformed, parse_model
from mlflow_safeflavor.graph.weights import Place

__all__ = ["Graph", "Input", "Malformed", "Weight", "describe_input", "lines_of", "read"]

_MOST_NODES = 30_000
_MOST_DIMENSIONS, _MOST_ELEMENTS = 32, 1 << 48
_VERSIONS = range(8, 14)
_OPSETS = range(18, 24)

_DTYPES = {
    1: "float32",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    2: "uint8",
    3: "int8",
}
"""Element types by the standard's number."""

_OPERATORS = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Attention",
        "AveragePool",
        "BatchNormalization",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "BlackmanWindow",
        "Cast",
        "CastLike",
        "Ceil",
        "Celu",
        "Clip",
        "Compress",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvTranspose",
        "Cos",
        "Cosh",
        "CumSum",
        "DFT",
        "DepthToSpace",
        "Det",
        "Div",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Flatten",
        "Floor",
        "GRU",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "GroupNormalization",
        "HammingWindow",
        "HannWindow",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "MaxPool",
        "Mean",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "RMSNormalization",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Resize",
        "RotaryEmbedding",
        "Round",
        "STFT",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tan",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unique",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
"""Of the standard's operators those that compute arrays: none with a subgraph, a sequence, a text, chance or a file.

Nor any that torch's exporter never writes and that has a kernel of its own with a record of trusting its arguments
(MaxUnpool, Col2Im, ReverseSequence, RNN), or might (OneHot, MelWeightMatrix, LpPool).
"""

_ATTRIBUTES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
"""Type of an attribute by the standard's number → the field that then holds it."""


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
class Weight:
    """A tensor of the artifact that the graph takes.

    Attributes:
        dtype: Like ``float32``.
        shape: Sizes.
        place: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Graph:
    """A checked forward.

    Attributes:
        content: The model as ONNX Runtime gets it.
        inputs: What it takes.
        outputs: What it gives, in its order.
        weights: By name.
        nodes: Operator, inputs and outputs of each, in the order in which they run.
        lookups: Input whose values are rows of a table → how many rows the shortest such table has.
        reused: Bytes of weights and constants, for each use but the first: what fusions may copy.
    """

    content: bytes
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    nodes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    lookups: Mapping[str, int]
    reused: int

    def misfit(self, inputs: Mapping[str, Any]) -> str | None:
        """What keeps the graph from running on these arrays, in words; None if nothing does."""
        if inputs.keys() != {known.name for known in self.inputs}:
            return f"arguments {sorted(inputs)}, not {sorted(known.name for known in self.inputs)}"
        sizes: dict[str, int] = {}
        for known in self.inputs:
            array = inputs[known.name]
            shape, dtype = tuple(array.shape), str(array.dtype)
            right = dtype == known.dtype and len(shape) == len(known.shape)
            for size, wanted in zip(shape, known.shape, strict=False):
                right &= size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
            if not right:
                return f"{known.name} {dtype}{list(shape)}, not {describe_input(known)}"
        return None

    def require_rows(self, inputs: Mapping[str, Any]) -> None:
        """Refuse what asks for a row that a table does not have: the standard counts negative ones from its end.

        Raises:
            IndexError: As torch does.
        """
        for name, rows in self.lookups.items():
            least, most = int(inputs[name].min(initial=0)), int(inputs[name].max(initial=0))
            if least < 0 or most >= rows:
                raise IndexError(f"{name} has {least if least < 0 else most}, which is no row of a table of {rows}")


def describe_input(known: Input) -> str:
    """``int64[rows, length]``."""
    return f"{known.dtype}[{', '.join(map(str, known.shape))}]"


def lines_of(graph: Graph) -> Iterator[str]:
    """The graph to be read: one line an input, a weight, a node and an output."""
    for known in graph.inputs:
        yield f"input {known.name}: {describe_input(known)}"
    for name, weight in graph.weights.items():
        yield f"weight {name}: {weight.dtype}{list(weight.shape)}"
    for operator, inputs, outputs in graph.nodes:
        yield f"{', '.join(outputs)} = {operator}({', '.join(name or '-' for name in inputs)})"


def read(content: bytes) -> Graph:
    """Check a model.

    Raises:
        Malformed: It is no model of ours, or holds what it must not; names the node or tensor.
    """
    model = parse_model(content)
    if model.get("ir_version") not in _VERSIONS:
        raise Malformed(f"version {model.get('ir_version')} of the format")
    opsets = [(entry.get("domain", ""), entry.get("version")) for entry in model["opset_import"]]
    if len(opsets) != 1 or opsets[0][0] or opsets[0][1] not in _OPSETS:
        raise Malformed(f"operators of {opsets}, not of the standard's version {_OPSETS[0]} to {_OPSETS[-1]}")
    graph = model.get("graph")
    if graph is None:
        raise Malformed("no graph")
    inputs = tuple(map(_input, graph["input"]))
    weights = dict(_initializers(graph["initializer"]))
    known = {f"{_IN}{value.name}" for value in inputs}
    if len(known) != len(inputs):
        raise Malformed("two inputs have one name")
    known |= _new(known, [tensor.get("name", "") for tensor in graph["initializer"]], "an initializer")
    sizes = {tensor["name"]: _bytes(tensor) for tensor in graph["initializer"]}
    nodes = []
    if len(graph["node"]) > _MOST_NODES:
        raise Malformed(f"{len(graph['node'])} nodes")
    for i, node in enumerate(graph["node"]):
        operator = node.get("op_type", "")
        where = f"node {i}, {operator[:40]}"
        if node.get("domain") or operator not in _OPERATORS:
            raise Malformed(f"{where}: no operator that a graph may hold")
        if missing := [name for name in node["input"] if name and name not in known]:
            raise Malformed(f"{where}: uses {missing[0][:60]!r}, which nothing before it gives")
        known |= _new(known, [name for name in node["output"] if name], where)
        nodes.append((operator, tuple(node["input"]), tuple(node["output"])))
        _check_attributes(node["attribute"], where)
        _check_granted(node, where)
        if all(name in sizes for name in node["input"] if name):
            own = [_bytes(attribute["t"]) for attribute in node["attribute"] if "t" in attribute]
            size = max([0, *own, *(sizes[name] for name in node["input"] if name)])
            sizes.update(dict.fromkeys(filter(None, node["output"]), size))
    outputs = [value.get("name", "") for value in graph["output"]]
    given = {name for _, _, names in nodes for name in names}
    if not outputs or len(set(outputs)) != len(outputs) or not all(name in given for name in outputs):
        raise Malformed("outputs that no node gives")
    if not all(name.startswith(_OUT) for name in outputs):
        raise Malformed("outputs of other names than a save gives")
    for value in graph["output"]:
        _typed(value, f"output {value['name'][:60]!r}")
    names = tuple(name.removeprefix(_OUT) for name in outputs)
    return Graph(content, inputs, names, weights, tuple(nodes), _lookups(nodes, weights), _reused(nodes, sizes))


_IN, _OUT = "input.", "output."
"""How the names of inputs and outputs begin, so that a forward may give what it takes under the same name."""


def _lookups(
    nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]], weights: Mapping[str, Weight]
) -> dict[str, int]:
    found: dict[str, int] = {}
    for operator, taken, _ in nodes:
        if operator == "Gather" and len(taken) == 2 and taken[0] in weights and taken[1].startswith(_IN):
            name, rows = taken[1].removeprefix(_IN), (*weights[taken[0]].shape, 0)[0]
            found[name] = min(rows, found.get(name, rows))
    return found


def _reused(nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]], sizes: Mapping[str, int]) -> int:
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
    """The dtype and the shape of an input or output; None for a size of which nothing is said."""
    tensor = value.get("type", {}).get("tensor_type", {})
    shape: list[int | str | None] = []
    for size in tensor.get("shape", {}).get("dim", ()):
        if len(size) > 1 or size.get("dim_value", 0) < 0:
            raise Malformed(f"{where}: a dimension with two sizes, or a negative one")
        shape.append(size.get("dim_value", size.get("dim_param")))
    return _dtype(tensor.get("elem_type"), where), shape


def _check_attributes(attributes: Sequence[Mapping[str, Any]], where: str) -> None:
    names = [attribute.get("name", "") for attribute in attributes]
    if len(set(names)) != len(names) or "" in names:
        raise Malformed(f"{where}: two attributes of one name, or one without")
    for name, attribute in zip(names, attributes, strict=True):
        field = _ATTRIBUTES.get(attribute.get("type", 0))
        there = {key for key, value in attribute.items() if key not in ("name", "type") and value != []}
        if field is None or not there <= {field} or field not in attribute:
            raise Malformed(f"{where}: attribute {name[:60]!r} is not of the type that it says")
        if name.startswith("value_string"):
            raise Malformed(f"{where}: texts")
        if name in ("to", "dtype", "output_datatype"):
            _dtype(attribute.get("i"), where)
        if "t" in attribute:
            _own(attribute["t"], where)


def _dtype(number: Any, where: str) -> str:
    if number not in _DTYPES:
        raise Malformed(f"{where}: element type {number}")
    return _DTYPES[number]


_VARIADIC = frozenset(("Concat", "Einsum", "Max", "Mean", "Min", "Sum"))


def _check_granted(node: Mapping[str, Any], where: str) -> None:
    """Refuse what kernels of ONNX Runtime take for granted: they would end the process, or read outside of an array.

    Found by ``tests/test_onnx_fuzz.py``, and never written by the exporter.
    """
    numbers = {attribute["name"]: attribute["i"] for attribute in node["attribute"] if "i" in attribute}
    left_out = node["input"] if node["op_type"] in _VARIADIC else node["input"][-1:]
    if "" in left_out:
        raise Malformed(f"{where}: an argument that is there and has no name")
    if numbers.get("num_outputs", len(node["output"])) != len(node["output"]):
        raise Malformed(f"{where}: {len(node['output'])} results, not {numbers['num_outputs']}")
    if numbers.get("batch_dims", 0) < 0:
        raise Malformed(f"{where}: batch_dims {numbers['batch_dims']}")


def _initializers(tensors: list[dict[str, Any]]) -> Iterator[tuple[str, Weight]]:
    for tensor in tensors:
        where = f"initializer {tensor.get('name', '')[:60]!r}"
        if tensor.get("data_location", 0) or tensor["external_data"]:
            if tensor.get("data_location") != 1 or "raw_data" in tensor:
                raise Malformed(f"{where}: is neither inside nor outside")
            dtype, shape = _dtype(tensor.get("data_type"), where), _shape(tensor, where)
            place = _place(tensor["external_data"], where)
            if place.length != math.prod(shape) * ITEM_SIZES[dtype]:
                raise Malformed(f"{where}: {place.length} bytes for {dtype}{list(shape)}")
            if dtype == "bfloat16":
                raise Malformed(f"{where}: {dtype}, which numpy has not")
            yield tensor.get("name", ""), Weight(dtype, shape, place)
        else:
            _own(tensor, where)


def _place(pairs: Sequence[Mapping[str, str]], where: str) -> Place:
    facts = {pair.get("key", ""): pair.get("value", "") for pair in pairs}
    if len(facts) != len(pairs) or facts.keys() != {"location", "offset", "length"}:
        raise Malformed(f"{where}: external data without location, offset and length, or with more")
    if not all(re.fullmatch(r"[0-9]{1,18}", facts[name], re.ASCII) for name in ("offset", "length")):
        raise Malformed(f"{where}: an offset or a length that is no number")
    return Place(facts["location"], int(facts["offset"]), int(facts["length"]))


def _own(tensor: Mapping[str, Any], where: str) -> None:
    """Refuse a constant inside the file that is not as long as it says."""
    dtype, content = _dtype(tensor.get("data_type"), where), tensor.get("raw_data", b"")
    wanted = math.prod(_shape(tensor, where)) * ITEM_SIZES[dtype]
    if tensor.get("data_location") or tensor["external_data"] or len(content) != wanted:
        raise Malformed(f"{where}: {len(content)} bytes, not {wanted}")
    if dtype == "bool" and content.translate(None, b"\0\1"):
        raise Malformed(f"{where}: truth values that are neither 0 nor 1")


def _bytes(tensor: Mapping[str, Any]) -> int:
    """Of a checked tensor."""
    return int(math.prod(tensor["dims"])) * ITEM_SIZES[_DTYPES[tensor["data_type"]]]


def _shape(tensor: Mapping[str, Any], where: str) -> tuple[int, ...]:
    shape = tuple(tensor["dims"])
    if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise Malformed(f"{where}: a negative size, or {len(shape)} dimensions")
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:  # 0 times 2**62 times 2**62 is 0
        raise Malformed(f"{where}: sizes {list(shape)}")
    return shape
