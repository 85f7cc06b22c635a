"""``graph.onnx``: a recorded forward, checked before ONNX Runtime sees it.

The file is not trusted. It may hold operators of the standard that compute arrays from arrays, and nothing else: no
subgraph, no function, no operator library, no file but the artifact's own weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_safeflavor.graph_weights import Place
from mlflow_safeflavor.inventory_file import ITEM_SIZES
from mlflow_safeflavor.onnx_file import Malformed, parse_model

__all__ = ["Graph", "Input", "Malformed", "Weight", "describe_input", "lines_of", "read"]

_MOST_NODES = 100_000
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
        "CenterCropPad",
        "Clip",
        "Col2Im",
        "Compress",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "ConvInteger",
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
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GreaterOrEqual",
        "GridSample",
        "GroupNormalization",
        "HammingWindow",
        "HannWindow",
        "HardSigmoid",
        "HardSwish",
        "Hardmax",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LSTM",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "LpPool",
        "MatMul",
        "Max",
        "MaxPool",
        "MaxUnpool",
        "Mean",
        "MeanVarianceNormalization",
        "MelWeightMatrix",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "RMSNormalization",
        "RNN",
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
        "ReverseSequence",
        "RotaryEmbedding",
        "Round",
        "STFT",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shape",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
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
"""Of the standard's operators those that compute arrays: none with a subgraph, a sequence, a text, chance or a file."""


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
    """

    content: bytes
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Weight]
    nodes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    lookups: Mapping[str, int]

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
        for attribute in node["attribute"]:
            if "t" in attribute:
                _own(attribute["t"], where)
    outputs = [value.get("name", "") for value in graph["output"]]
    given = {name for _, _, names in nodes for name in names}
    if not outputs or len(set(outputs)) != len(outputs) or not all(name in given for name in outputs):
        raise Malformed("outputs that no node gives")
    if not all(name.startswith(_OUT) for name in outputs):
        raise Malformed("outputs of other names than a save gives")
    names = tuple(name.removeprefix(_OUT) for name in outputs)
    return Graph(content, inputs, names, weights, tuple(nodes), _lookups(nodes, weights))


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


def _new(known: set[str], names: list[str], where: str) -> set[str]:
    if len(set(names)) != len(names) or "" in names or not known.isdisjoint(names):
        raise Malformed(f"{where}: gives a name that there is already, or none")
    return set(names)


def _input(value: Mapping[str, Any]) -> Input:
    tensor = value.get("type", {}).get("tensor_type", {})
    shape: list[int | str] = []
    for size in tensor.get("shape", {}).get("dim", ()):
        fixed = size.get("dim_value")
        if (fixed is None) == ("dim_param" not in size) or (fixed is not None and fixed < 0):
            raise Malformed(f"input {value.get('name', '')[:60]!r}: a dimension without a size")
        shape.append(size["dim_param"] if fixed is None else fixed)
    name = value.get("name", "")
    if not name.startswith(_IN):
        raise Malformed(f"input {name[:60]!r}: another name than a save gives")
    return Input(name.removeprefix(_IN), _dtype(tensor.get("elem_type"), "an input"), tuple(shape))


def _dtype(number: Any, where: str) -> str:
    if number not in _DTYPES:
        raise Malformed(f"{where}: element type {number}")
    return _DTYPES[number]


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
    wanted = math.prod(_shape(tensor, where)) * ITEM_SIZES[_dtype(tensor.get("data_type"), where)]
    if tensor.get("data_location") or tensor["external_data"] or len(tensor.get("raw_data", b"")) != wanted:
        raise Malformed(f"{where}: {len(tensor.get('raw_data', b''))} bytes, not {wanted}")


def _shape(tensor: Mapping[str, Any], where: str) -> tuple[int, ...]:
    if any(size < 0 for size in tensor["dims"]):
        raise Malformed(f"{where}: a negative size")
    return tuple(tensor["dims"])
