"""Work that no output needs: the same bits without it, and less of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mlflow_safeflavor.graph.shortcuts import take_shortcuts

WIDTH, HEADS = 8, 2
DRAW = np.random.default_rng(0)

# Constants of a node's second input, by name. "one" is broadcast along the length, "places" is not.
CONSTANTS = {
    "matrix": DRAW.standard_normal((WIDTH, WIDTH)),
    "matrices": DRAW.standard_normal((1, WIDTH, WIDTH)),
    "bias": DRAW.standard_normal(WIDTH),
    "one": DRAW.standard_normal((1, 1, WIDTH)),
    "places": DRAW.standard_normal((1, 5, WIDTH)),
    "scale": DRAW.standard_normal(WIDTH),
    "table": DRAW.standard_normal((5, WIDTH)),
}


def a_model(nodes, outputs):
    """(rows, 5, WIDTH) in, with shapes of all values, as the exporter makes them."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 5, WIDTH])
    constants = [
        numpy_helper.from_array(np.float32(value), name) for name, value in CONSTANTS.items()
    ]
    constants += [
        numpy_helper.from_array(np.int64(value), name)
        for name, value in {
            "zero": 0,
            "last": -1,
            "cut": [0, 0, HEADS, WIDTH // HEADS],
            "join": [0, 0, WIDTH],
            "as it is": [0, 0, 0, 0],
            "mixed": [0, 5, HEADS, WIDTH // HEADS],
            "join mixed": [0, HEADS, 5 * WIDTH // HEADS],
        }.items()
    ]
    graph = helper.make_graph(
        nodes,
        "forward",
        [given],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def shortened(model):
    """It with shortcuts, as the standard reads it."""
    other = ir.from_proto(model)
    take_shortcuts(other)
    proto = ir.to_proto(other)
    # Shapes that were noted on the way are right.
    onnx.checker.check_model(proto, full_check=True)
    return proto


def answers(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x})


def require_same_bits(model, other):
    for rows in (1, 3):
        x = DRAW.standard_normal((rows, 5, WIDTH), dtype=np.float32)
        for one, two in zip(answers(model, x), answers(other, x), strict=True):
            np.testing.assert_array_equal(one, two)


def node(operator, inputs, output, **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


def select(value, index="zero", axis=1):
    return node("Gather", [value, index], "selected", axis=axis)


def operators(model):
    return [made.op_type for made in model.graph.node]


# A chain of nodes, each taking the value before, or an earlier one beside it. A norm over places is
# not among them: ONNX Runtime 1.23 adds a residual to it by a kernel that refuses its axis.
STEPS = {
    "product": lambda x, y: ("MatMul", [x, "matrix"], {}),
    "stack": lambda x, y: ("MatMul", [x, "matrices"], {}),
    "bias": lambda x, y: ("Add", ["bias", x], {}),
    "one": lambda x, y: ("Mul", [x, "one"], {}),
    "places": lambda x, y: ("Add", [x, "places"], {}),
    "residual": lambda x, y: ("Add", [x, y], {}),
    "square": lambda x, y: ("Mul", [x, x], {}),
    "gelu": lambda x, y: ("Gelu", [x], {}),
    "norm": lambda x, y: ("LayerNormalization", [x, "scale", "bias"], {}),
    "softmax over places": lambda x, y: ("Softmax", [x], {"axis": 1}),
}


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)),
        min_size=1,
        max_size=9,
    ),
    also=st.integers(0, 20),
)
def test_any_chain_gives_the_same_bits(steps, also):
    values, nodes = ["x"], []
    for i, (step, earlier) in enumerate(steps):
        operator, inputs, attributes = STEPS[step](values[-1], values[earlier % len(values)])
        nodes.append(node(operator, inputs, f"v{i}", **attributes))
        values.append(f"v{i}")
    # Sometimes a value on the way is an output, too.
    outputs = ["selected", *({values[also]} & {*values[1:]} if also < len(values) else ())]
    model = a_model([*nodes, select(values[-1])], outputs)
    require_same_bits(model, shortened(model))


# Those through which the first place is that of what goes in.
LAYER = [
    node("Softmax", ["x"], "attended", axis=1),
    node("MatMul", ["attended", "matrix"], "a"),
    node("Add", ["a", "bias"], "b0"),
    node("Mul", ["b0", "one"], "b"),
    node("Gelu", ["b"], "c"),
    node("Add", ["c", "attended"], "d"),
    node("LayerNormalization", ["d", "scale", "bias"], "e"),
]


def test_a_layer_behind_which_one_token_is_read():
    model = a_model([*LAYER, select("e")], ["selected"])
    other = shortened(model)
    require_same_bits(model, other)
    # Once for both that take it, and before the product.
    assert operators(other)[:3] == ["Softmax", "Gather", "MatMul"]
    assert operators(other).count("Gather") == 2


@pytest.mark.parametrize("nodes", [
    pytest.param([*LAYER, select("e", "last")], id="another token"),
    pytest.param([*LAYER, select("e", axis=2)], id="another axis"),
    pytest.param([*LAYER, node("ReduceMean", ["e"], "selected", keepdims=0)], id="all tokens"),
    pytest.param([*LAYER, node("LayerNormalization", ["e", "table", "table"], "f", axis=1),
        select("f")], id="a norm over places"),
    pytest.param([node("Gelu", ["x"], "y"), select("y")], id="no product"),
    pytest.param([node("MatMul", ["x", "matrices"], "y"), select("y", axis=0)], id="a stack"),
    pytest.param([*LAYER, node("Shape", ["e"], "size"), select("e"),
        node("CastLike", ["size", "x"], "more")], id="its shape is asked"),
])  # fmt: skip
def test_what_stays(nodes):
    outputs = ["selected", *(["more"] if nodes[-1].op_type == "CastLike" else [])]
    model = a_model(nodes, outputs)
    assert operators(shortened(model)) == operators(model)


def test_an_output_on_the_way_is_whole():
    model = a_model([*LAYER, select("e")], ["selected", "e"])
    other = shortened(model)
    assert operators(other) == operators(model)
    assert [array.shape for array in answers(other, np.ones((3, 5, WIDTH), np.float32))] == [
        (3, WIDTH), (3, 5, WIDTH)
    ]  # fmt: skip


def attention(perm=(0, 2, 1, 3), between=None, rotated="", query="q"):
    """Heads that are cut, turned, and joined again, ``between`` in another shape.

    Those of the names in ``rotated`` are rotated by angles, too.
    """
    nodes = [
        helper.make_node("Split", ["x"], [f"angle {i}" for i in range(4)], num_outputs=4, axis=-1),
        node("Cos", ["angle 0"], "cos"),
        node("Sin", ["angle 0"], "sin"),
    ]
    for name in "qkv":
        nodes.append(node("MatMul", ["x", "matrix"], f"{name} product"))
        nodes.append(node("Reshape", [f"{name} product", "cut"], f"{name} cut"))
        turned = f"{name} turned" if name in rotated else name
        nodes.append(node("Transpose", [f"{name} cut"], turned, perm=perm))
        if name in rotated:
            nodes.append(node("RotaryEmbedding", [turned, "cos", "sin"], name))
    nodes.append(node("Attention", [query, "k", "v"], "heads"))
    if between:
        nodes.append(node("Reshape", ["heads", between], "reshaped"))
    last = nodes[-1].output[0]
    return [*nodes, node("Transpose", [last], "turned", perm=perm if not between else (0, 2, 1, 3))]


JOIN = node("Reshape", ["turned", "join"], "y")


@pytest.mark.parametrize("between", [None, "as it is"])
@pytest.mark.parametrize("words", [None, "n // 2 + 1"])
def test_heads_side_by_side(between, words):
    model = a_model([*attention(between=between), JOIN], ["y"])
    # A length that is told in other words behind the cut, as that of an image's patches is.
    for value in model.graph.value_info:
        if words and "cut" in value.name:
            value.type.tensor_type.shape.dim[1].dim_param = words
    other = shortened(model)
    assert operators(other) == ["MatMul"] * 3 + ["Attention"]
    heads = {made.name: made.i for made in other.graph.node[-1].attribute}
    assert (heads["q_num_heads"], heads["kv_num_heads"]) == (HEADS, HEADS)
    # The constants that cut and joined them are gone, too.
    assert not {"cut", "join", "as it is"} & {tensor.name for tensor in other.graph.initializer}
    require_same_bits(model, other)


def test_heads_that_are_rotated():
    model = a_model([*attention(rotated="qk"), JOIN], ["y"])
    other = shortened(model)
    rotary = ["Split", "Cos", "Sin", *["MatMul", "RotaryEmbedding"] * 2]
    assert operators(other) == [*rotary, "MatMul", "Attention"]
    require_same_bits(model, other)


@pytest.mark.parametrize("nodes", [
    pytest.param([*attention(rotated="k", query="k"), JOIN], id="rotated for both"),
    pytest.param([*attention(perm=(0, 1, 2, 3)), JOIN], id="not turned"),
    pytest.param([*attention(between="mixed"),
        node("Reshape", ["turned", "join mixed"], "y")], id="mixed"),
    pytest.param([*attention(), node("Relu", ["turned"], "y")], id="not joined"),
    pytest.param([*attention(), JOIN, node("Relu", ["heads"], "more")], id="taken as they are"),
])  # fmt: skip
def test_heads_that_stay(nodes):
    model = a_model(nodes, ["y", *(["more"] if nodes[-1].output[0] == "more" else [])])
    other = shortened(model)
    assert {*operators(model)} - {*operators(other)} <= {"Split", "Cos", "Sin"}
    assert operators(other).count("Transpose") > 2
    require_same_bits(model, other)


def test_shapes_that_nobody_knows():
    """As fusions leave them: nothing is rewritten on a guess."""
    model = a_model([*attention(), JOIN], ["y"])
    del model.graph.value_info[:]
    assert operators(shortened(model)).count("Transpose") == 4
