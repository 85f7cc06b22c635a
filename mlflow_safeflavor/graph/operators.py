"""Operators that a graph may hold, and how each is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_safeflavor.graph.initializers import check_constant, dtype_of
from mlflow_safeflavor.graph.onnx_file import Malformed

__all__ = ["OPERATORS", "check_attributes", "check_granted"]

# Of the standard's operators those that compute arrays of arrays: none with a subgraph, a sequence,
# a text, chance or a file. Nor any that torch's exporter never writes and that has a kernel of its
# own with a record of trusting its arguments (MaxUnpool, Col2Im, ReverseSequence, RNN), or might
# (OneHot, MelWeightMatrix, LpPool).
OPERATORS = frozenset(
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

# Type of an attribute by the standard's number → the field that then holds it.
_ATTRIBUTES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}


def check_attributes(attributes: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise ``Malformed`` for attributes that are not of the type that they say, or hold texts."""
    names = [attribute.get("name", "") for attribute in attributes]
    if len(set(names)) != len(names) or "" in names:
        raise Malformed(f"{where}: two attributes of one name, or one without")
    for name, attribute in zip(names, attributes, strict=True):
        field = _ATTRIBUTES.get(attribute.get("type", 0))
        there = {
            key for key, value in attribute.items() if key not in ("name", "type") and value != []
        }
        if field is None or not there <= {field} or field not in attribute:
            raise Malformed(f"{where}: attribute {name[:60]!r} is not of the type that it says")
        if name.startswith("value_string"):
            raise Malformed(f"{where}: texts")
        # Element types that a node casts to: neither texts nor complex numbers.
        if name in ("to", "dtype", "output_datatype"):
            dtype_of(attribute.get("i"), where)
        if "t" in attribute:
            check_constant(attribute["t"], where)


# Operators whose arguments are all required, in any number.
_VARIADIC = frozenset(("Concat", "Einsum", "Max", "Mean", "Min", "Sum"))


def check_granted(node: Mapping[str, Any], where: str) -> None:
    """Raise ``Malformed`` for arguments that kernels of ONNX Runtime do not check themselves.

    Found by ``tests/integration/test_onnx_fuzz.py`` in ONNX Runtime 1.32, and never written by the
    exporter.
    """
    numbers = {
        attribute["name"]: attribute["i"] for attribute in node["attribute"] if "i" in attribute
    }
    left_out = node["input"] if node["op_type"] in _VARIADIC else node["input"][-1:]
    # An optional argument before others has no name; the last one that is there must have one.
    if "" in left_out:
        raise Malformed(f"{where}: an argument that is there and has no name")
    # Split ends the process where it has another number of results than it says.
    if numbers.get("num_outputs", len(node["output"])) != len(node["output"]):
        raise Malformed(f"{where}: {len(node['output'])} results, not {numbers['num_outputs']}")
    # GatherND overwrites memory where it is negative.
    if numbers.get("batch_dims", 0) < 0:
        raise Malformed(f"{where}: batch_dims {numbers['batch_dims']}")
