"""The check of graph.onnx, piece by piece.

What is read, what is refused by which words, and where weights are.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mlflow_safeflavor import machine
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.engine import GraphEngine, runtime_of
from mlflow_safeflavor.graph.graph import Weight, lines_of
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.graph.onnx_file import Malformed, parse_model, write_model
from mlflow_safeflavor.graph.operators import OPERATORS
from mlflow_safeflavor.graph.weights import Extent, map_weights

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra `openvino` is not installed"
)
"""Not importorskip: whoever imports OpenVINO as it comes tells its makers, over the network."""


def made(*nodes, constants=(), inputs=(("x", 1, ["rows", 4]),), outputs=("y",), change=None):
    """A model as a save writes it."""
    graph = helper.make_graph(
        list(nodes), "forward",
        [helper.make_tensor_value_info(f"input.{name}", kind, shape) for name, kind,
            shape in inputs],
        [helper.make_tensor_value_info(f"output.{name}", 1, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    if change is not None:
        change(model)
    return model.SerializeToString()


@pytest.fixture(params=["onnx", pytest.param("openvino", marks=needs_openvino)])
def runtime(request):
    """What makes sessions: ONNX Runtime, and OpenVINO."""
    return runtime_of(request.param)


RELU = helper.make_node("Relu", ["input.x"], ["output.y"])
X = {"x": np.array([[1, -2, 3, -4]], np.float32)}


def test_what_is_read(runtime):
    outside = onnx.TensorProto(
        name="w", data_type=1, dims=[4, 2], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in {"location": "model.safetensors", "offset": "64", "length": "32"}.items():
        outside.external_data.add(key=key, value=value)
    graph = read(
        made(
            helper.make_node("MatMul", ["input.x", "w"], ["z"]),
            helper.make_node("Add", ["z", "b"], ["output.y"]),
            constants=[("b", np.ones(2, np.float32))],
            change=lambda model: model.graph.initializer.append(outside),
        )
    )  # fmt: skip
    assert [str(line) for line in lines_of(graph)] == [
        "input x: float32[rows, 4]", "weight w: float32[4, 2]", "z = MatMul(input.x, "
                                                                "w)", "output.y = Add(z, b)",
    ]  # fmt: skip
    assert graph.weights == {"w": Weight("float32", (4, 2), Extent("model.safetensors", 64, 32))}
    assert (graph.outputs, graph.lookups, graph.reused) == (("y",), {}, 0)
    found = runtime(graph, {"w": np.eye(4, 2, dtype=np.float32)}, threads=1)(X)
    assert found["y"].tolist() == [[2, -1]]


def test_what_was_read_is_written():
    """Field by field, as the standard's own reader sees it.

    Numbers below zero and none among them.
    """
    nodes = [
        helper.make_node("Gather", ["input.x", "b"], ["z"], axis=-1),
        helper.make_node(
            "Resize",
            ["z", "", "b"],
            ["output.y"],
            cubic_coeff_a=-0.75,
            mode="cubic",
            axes=[-1, 0, 300],
        ),
    ]
    content = made(
        *nodes, constants=[("b", np.array([-1, 0, 2**40])), ("c", np.array(1.5, np.float32))]
    )
    written = write_model(parse_model(content))
    assert onnx.load_model_from_string(written) == onnx.load_model_from_string(content)
    assert write_model(parse_model(written)) == written


def test_what_a_graph_takes():
    shapes = (("a", 7, ["rows", "length"]), ("b", 7, ["rows", "length"]), ("c", 1, [3]))
    graph = read(made(helper.make_node("Add", ["input.a", "input.b"], ["output.y"]), inputs=shapes))
    a, c = np.zeros((2, 5), np.int64), np.zeros(3, np.float32)
    assert graph.misfit({"a": a, "b": a, "c": c}) is None
    for wrong in ({"b": a[:, :4]}, {"b": a[0]}, {"b": a.astype(np.int32)}, {"c": c[:2]}):
        assert str(graph.misfit({"a": a, "b": a, "c": c} | wrong)).startswith(next(iter(wrong)))
    assert graph.misfit({"a": a}) == "arguments ['a'], not ['a', 'b', 'c']"


def test_rows_of_the_shortest_table(runtime):
    constants = [("long", np.zeros((9, 2), np.float32)), ("short", np.zeros((5, 2), np.float32))]
    extents = {"long": (72, 0), "short": (40, 72)}

    def move_outside(model):
        for entry in model.graph.initializer:
            entry.ClearField("raw_data")
            entry.data_location = 1
            for key, value in zip(("length", "offset"), extents[entry.name], strict=True):
                entry.external_data.add(key=key, value=str(value))
            entry.external_data.add(key="location", value="w")

    graph = read(
        made(
            helper.make_node("Gather", ["long", "input.ids"], ["a"]),
            helper.make_node("Gather", ["short", "input.ids"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["output.y"]),
            constants=constants, inputs=(("ids", 7, ["rows"]),), change=move_outside,
        )
    )  # fmt: skip
    assert graph.lookups == {"ids": 5}
    engine = GraphEngine(runtime(graph, dict(constants), threads=1))
    assert engine({"ids": np.array([4, 0])})["y"].shape == (2, 2)
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=str(wrong)):
            engine({"ids": np.array([0, wrong])})


def attribute(model, **changes):
    found = model.graph.node[0].attribute[0]
    for name, value in changes.items():
        if isinstance(value, list):
            getattr(found, name)[:] = value
        else:
            setattr(found, name, value)


CAST = (helper.make_node("Cast", ["input.x"], ["output.y"], to=1),)
WRONG = {
    "element type 8": (CAST, lambda model: attribute(model, i=8)),
    "not of the type that it says": (CAST, lambda model: attribute(model, ints=[1])),
    "node 0, Loop: no operator": ([helper.make_node("Loop", ["input.x"], ["output.y"])], None),
    "no operator that a "
    "graph": ([helper.make_node("Relu", ["input.x"], ["output.y"], domain="ai.onnx")], None),
    "node 0, Relu: uses 'z', which "
    "nothing": ([helper.make_node("Relu", ["z"], ["output.y"])], None),
    "gives a name that there is already": ([RELU, RELU], None),
    "outputs that no node gives": ([helper.make_node("Relu", ["input.x"], ["y"])], None),
    "has no name": ([helper.make_node("Max", ["input.x", "", "input.x"], ["output.y"])], None),
    "1 results, not "
    "2": ([helper.make_node("Split", ["input.x"], ["output.y"], num_outputs=2)], None),
    "batch_dims "
    "-2": ([helper.make_node("GatherND", ["input.x", "input.x"], ["output.y"], batch_dims=-2)],
        None),
    "texts": ([helper.make_node("Constant", [], ["output.y"], value_string="a")], None),
    "version 3 of the format": ([RELU], lambda model: setattr(model, "ir_version", 3)),
    "operators of": ([RELU], lambda model: setattr(model.opset_import[0], "version", 99)),
    "input 'x': another name": ([RELU], lambda model: setattr(model.graph.input[0], "name", "x")),
    "outputs of other names": (
        [helper.make_node("Relu", ["input.x"], ["y"])],
        lambda model: setattr(model.graph.output[0], "name", "y")),
    "has field 14, which no save writes": ([RELU], lambda model: model.metadata_props.add(key="a")),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_what_is_refused(words):
    nodes, change = WRONG[words]
    with pytest.raises(Malformed, match=words):
        read(made(*nodes, change=change))


@pytest.mark.parametrize(
    ("array", "change", "words"),
    [
        (np.zeros(3, bool), {"raw_data": b"\0\1\2"}, "neither 0 nor 1"),
        (np.zeros(3, np.float32), {"raw_data": b"\0" * 8}, "8 bytes, not 12"),
        (np.zeros(0, np.float32), {"dims": [0, 2**62, 2**62]}, "sizes"),
        (np.zeros(1, np.float32), {"dims": [1] * 33}, "33 dimensions"),
        (np.zeros(1, np.float32), {"dims": [-1, -1]}, "negative size"),
        (np.zeros(1, np.float32), {"data_location": 1}, "neither inside nor outside"),
        (np.zeros(1, np.float32), {"data_type": 8}, "element type 8"),
    ],
)
def test_constants_that_are_refused(array, change, words):
    def damage(model):
        for name, value in change.items():
            if isinstance(value, list):
                getattr(model.graph.initializer[0], name)[:] = value
            else:
                setattr(model.graph.initializer[0], name, value)

    with pytest.raises(Malformed, match=f"initializer 'c'.*{words}"):
        read(made(RELU, constants=[("c", array)], change=damage))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x08", "no number"),
        (b"\x08" + b"\xff" * 11, "no number"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x08\x01\x08\x01", "ir_version comes twice"),
        (b"\x3a\x05", "graph ends behind the end"),
        (b"\x38\x05", "graph is of another type"),
        (b"\x0b\x0c", "ir_version is of another type"),  # a group
        (b"\x00\x00", "field 0"),
        (b"\x12\x01\xff", "producer_name is no text"),
        (b"\x3a\x02\x0a\x09", "node ends behind the end"),
        (b"\x3a\x88\xea\x30" + b"\x0a\x00" * 400_004, "more than 400000 values"),
    ],
)
def test_bytes_that_are_no_model(content, words):
    with pytest.raises(Malformed, match=words):
        parse_model(content)


def test_numbers_are_those_of_the_standard():
    """Packed and one by one, negative and large, in more bytes than are needed."""
    dims = [0, 1, 127, 128, 2**31, 2**63 - 1]
    packed = onnx.TensorProto(dims=dims).SerializeToString()
    single = b"".join(b"\x08" + varint(size) for size in dims)
    padded = b"\x08\x85\x80\x80\x00"
    for content, wanted in (
        (packed, dims),
        (single, dims),
        (padded, [5]),
        (b"\x08" + b"\xff" * 9 + b"\x01", [-1]),
    ):
        tensor = onnx.TensorProto.FromString(content)
        assert list(tensor.dims) == wanted
        graph = b"\x2a" + varint(len(content)) + content
        found = parse_model(b"\x3a" + varint(len(graph)) + graph)
        assert found["graph"]["initializer"][0]["dims"] == wanted


def varint(number):
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def test_every_operator_is_of_the_standard_and_makes_arrays_of_arrays():
    for name in OPERATORS:
        schema = onnx.defs.get_schema(name, 23)
        kinds = {attribute.type for attribute in schema.attributes.values()}
        assert not kinds & {
            onnx.defs.OpSchema.AttrType.GRAPH,
            onnx.defs.OpSchema.AttrType.GRAPHS,
        }, name
        assert schema.deprecated is False, name
        for part in [*schema.inputs, *schema.outputs]:
            assert any(kind.startswith("tensor(") for kind in part.types), name


# Weights.


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.data.mkdir()
    (layout.data / "model.safetensors").write_bytes(struct.pack("<8f", *range(8)) + b"\0\1\2\1")
    return layout


def extents(extent, dtype="float32", shape=(2, 2)):
    return {"w": Weight(dtype, shape, extent)}


def test_weights_are_mapped_and_never_written(layout):
    (found,) = map_weights(
        extents(Extent("model.safetensors", 8, 16)), ["model.safetensors"], layout
    ).values()
    assert found.tolist() == [[2, 3], [4, 5]]
    assert not found.flags.writeable
    assert not found.flags.owndata


@pytest.mark.parametrize(
    "extent",
    [
        Extent("model.safetensors", 24, 16), Extent("model.safetensors", 2**62, 16),
        Extent("model.safetensors", 2, 16),
        Extent("other.safetensors", 0, 16), Extent("../MLmodel", 0, 16), Extent("/dev/zero", 0, 16),
        Extent("", 0, 16),
        Extent("*/_ORT_MEM_ADDR_/*", 0, 16),
    ],
)  # fmt: skip
def test_weights_outside_of_the_files(layout, extent):
    with pytest.raises(IntegrityError, match="initializer 'w'"):
        map_weights(extents(extent), ["model.safetensors"], layout)


def test_truth_values_of_two(layout):
    extent = extents(Extent("model.safetensors", 32, 2), "bool", (2,))
    assert map_weights(extent, ["model.safetensors"], layout)["w"].tolist() == [False, True]
    with pytest.raises(IntegrityError, match="truth values"):
        map_weights(
            extents(Extent("model.safetensors", 33, 2), "bool", (2,)), ["model.safetensors"], layout
        )


# Sessions.


def test_what_no_runtime_takes(runtime):
    graph = read(
        made(
            helper.make_node("MatMul", ["input.x", "w"], ["output.y"]),
            constants=[("w", np.ones((3, 2), np.float32))],
        )
    )
    with pytest.raises(StructureError, match=r"graph\.onnx"):
        runtime(graph, {}, threads=1)


def test_a_file_of_two_formats_is_read_as_the_one_that_was_checked():
    """ONNX Runtime looks for a word in bytes 4 to 8, and would read its own format from there."""
    content = made(RELU, change=lambda model: model.ClearField("producer_name"))
    both = b"\x12\x26abORTM" + bytes(32) + content
    assert parse_model(both)["producer_name"][2:6] == "ORTM"
    assert Session(read(both), {}, threads=1)(X)["y"].tolist() == [[1, 0, 3, 0]]


def test_nothing_is_computed_before_the_first_run():
    """Neither constants nor weights into which norms are fused.

    That would be outside the bound of memory.
    """
    zeros = helper.make_node("ConstantOfShape", ["shape"], ["z"])
    nodes = [zeros, helper.make_node("Add", ["z", "input.x"], ["output.y"])]
    graph = read(made(*nodes, constants=[("shape", np.array([2**27, 1]))]))  # 512 MB
    before = resident()
    session = Session(graph, {}, threads=1)
    assert resident() - before < 2**27
    del session


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_weights_that_many_nodes_use_count_once_more_each():
    nodes = [
        helper.make_node("MatMul", [f"v{i}" if i else "input.x", "alias"], [f"v{i + 1}"])
        for i in range(5)
    ]
    last = helper.make_node("Identity", ["v5"], ["output.y"])
    alias = helper.make_node("Unsqueeze", ["w", "axis"], ["alias"])
    constants = [("w", np.zeros((4, 4), np.float32)), ("axis", np.array([0]))]
    assert read(made(alias, *nodes, last, constants=constants)).reused == 4 * 64


def test_memory_of_a_container(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    folder = tmp_path / "sys/fs/cgroup/a/b"
    folder.mkdir(parents=True)
    everything = machine.available_memory(tmp_path)
    (folder / "memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path) == everything
    (folder.parent / "memory.max").write_text(f"{2**28}\n")
    assert machine.available_memory(tmp_path) == 2**28


# What is said of it.

SEEN = {
    "dtype": "float32",
    "inputs": 1,
    "difference": 0.0,
    "threads": True,
    "batch": True,
    "padding": True,
}


@pytest.mark.parametrize(
    "facts",
    [
        {"version": 1, "reason": "a"}, {"version": 1, "proof": {}}, {"version": 2, "proof": {}},
        {"version": 1}, [],
        {"version": 1, "proof": {"openvino": SEEN}},
        {"version": 1, "proof": {"onnx": SEEN, "other": SEEN}},
        {"version": 1, "proof": {"onnx": SEEN, "openvino": {}}},
        {"version": 1, "proof": {"onnx": "x"}},
        *({"version": 1, "proof": {"onnx": SEEN | wrong}} for wrong in (
            {"difference": "x"}, {"threads": 1}, {"dtype": "float16"}, {"inputs": True},
            {"safe": True},
        )),
        {"version": 1, "proof": {"onnx": {name: SEEN[name] for name in SEEN if name != "padding"}}},
    ],
)  # fmt: skip
def test_facts_that_are_none(layout, facts):
    from mlflow_safeflavor.graph.file import format_graph

    layout.graph.write_bytes(b"")
    layout.graph_facts.write_text(json.dumps(facts))
    with pytest.raises(IntegrityError, match=r"graph\.json"):
        format_graph(layout)


def test_facts_in_words(layout):
    from mlflow_safeflavor.graph.file import format_graph, keeps_bits

    layout.graph.write_bytes(b"")
    other = SEEN | {"padding": False, "dtype": "bfloat16", "difference": 0.004}
    layout.graph_facts.write_text(
        json.dumps({"version": 1, "proof": {"onnx": SEEN, "openvino": other}})
    )
    assert format_graph(layout) == {
        "graph": "same bits for any number of threads, any batch, any padding; within 0 of the "
        "module on 1 inputs",
        "graph in OpenVINO": "same bits for any number of threads, any batch; other bits for any "
        "padding; within 0.004 of the module on 1 inputs in bfloat16",
    }
    assert keeps_bits(layout, "onnx", "float32")
    assert not keeps_bits(layout, "openvino", "bfloat16")  # other bits for any padding
    layout.graph_facts.write_text(
        json.dumps({"version": 1, "proof": {"onnx": SEEN, "openvino": SEEN}})
    )
    assert keeps_bits(layout, "openvino", "float32")
    assert not keeps_bits(layout, "openvino", "bfloat16")  # nothing was seen of that
