"""Whatever is written into graph.onnx: one error of ours, or a session that is made or refused.

Never a crash.

And what our reader accepts, it sees as the standard's own parser does.

FUZZ_SECONDS=600 pytest tests/integration/test_onnx_fuzz.py   ten minutes instead of a few seconds
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mlflow_safeflavor.graph import onnx_engine, operators
from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.graph.onnx_file import Malformed, parse_model
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.save.graph import record

SECONDS = float(os.environ.get("FUZZ_SECONDS", "12"))
OPERATORS = sorted(operators.OPERATORS)


class Small(nn.Module):
    """A little of everything that models do."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.words(input_ids))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        mask = attention_mask[:, None, None, :].bool().expand(-1, -1, input_ids.shape[1], -1)
        x = nn.functional.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], attn_mask=mask
        )[:, 0]
        x = torch.cat([x, x * 2], dim=1).mean(dim=1)
        return {"logits": self.out(nn.functional.gelu(x))}


@pytest.fixture(scope="module")
def recorded() -> bytes:
    """A real graph with its weights inside."""
    torch.manual_seed(0)
    module = Small().eval().requires_grad_(False)
    inputs = {
        "input_ids": torch.randint(20, (2, 5)),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    graph, _ = record(module, find_slots(module), {}, [inputs])
    return graph.content


# Mutations.

NUMBERS = [0, 1, -1, 2, 3, 7, 16, 23, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
TEXTS = [
    "",
    "input.input_ids",
    "output.logits",
    "a\0b",
    "ai.onnx",
    "com.microsoft",
    "ORTM",
    "/etc/passwd",
    "../x",
]
LABEL = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"]


def parts(message):
    """A message and all within."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if field.is_repeated else [value]:
                yield from parts(part)


def mutate_proto(content, draw):
    """One field of one message: removed, doubled, exchanged, or another value."""
    model = onnx.ModelProto.FromString(content)
    message = draw.choice(list(parts(model)))
    field = draw.choice(list(message.DESCRIPTOR.fields))
    if field.is_repeated:
        values = getattr(message, field.name)
        kind = draw.choice(["drop", "double", "swap", "add"]) if len(values) else "add"
        at, other = (draw.randrange(len(values)) for _ in range(2)) if len(values) else (0, 0)
        kept = list(values)
        if kind == "drop":
            del kept[at]
        elif kind == "double":
            kept.insert(other, kept[at])
        elif kind == "swap":
            kept[at], kept[other] = kept[other], kept[at]
        elif not field.message_type:
            kept.insert(other, some_value(field, draw))
        kept = [
            part if not field.message_type else type(part).FromString(part.SerializeToString())
            for part in kept
        ]
        message.ClearField(field.name)
        getattr(message, field.name).extend(kept)
        if kind == "add" and field.message_type:
            getattr(message, field.name).add()
    elif field.message_type:
        draw.choice(
            [
                lambda: getattr(message, field.name).SetInParent(),
                lambda: message.ClearField(field.name),
            ]
        )()
    elif draw.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, some_value(field, draw))
    return model.SerializeToString()


def some_value(field, draw):
    if field.name == "op_type":
        return draw.choice(OPERATORS)
    if field.enum_type:
        return draw.choice(field.enum_type.values).number
    if field.type == field.TYPE_STRING:
        return draw.choice(TEXTS)
    if field.type == field.TYPE_BYTES:
        return draw.randbytes(draw.choice([0, 1, 4, 8, 64]))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30])
    number = draw.choice(NUMBERS)
    if field.type == field.TYPE_INT32:
        return (number + 2**31) % 2**32 - 2**31
    return number % 2**64 if field.type == field.TYPE_UINT64 else number


def mutate_bytes(content, draw):
    """A byte, a slice or a field of the bytes."""
    at, size = draw.randrange(len(content)), draw.choice([1, 1, 2, 4, 9, 40])
    piece = content[at : at + size]
    kind = draw.choice(["flip", "drop", "double", "move", "varint", "field"])
    if kind == "flip":
        piece = bytes([piece[0] ^ (1 << draw.randrange(8))]) + piece[1:]
    elif kind == "drop":
        piece = b""
    elif kind == "double":
        piece += piece
    elif kind == "move":
        other = draw.randrange(len(content))
        piece += content[other : other + size]
    elif kind == "varint":
        piece = draw.choice(
            [b"\xff" * 9 + b"\x01", b"\x80\x00", b"\xff\xff\xff\xff\x07", b"\x80" * 10 + b"\x01"]
        )
    else:
        piece = bytes([draw.randrange(256)]) + piece
    return content[:at] + piece + content[at + size :]


def mutated(content, seed):
    draw = random.Random(seed)
    for _ in range(draw.choice([1, 1, 2, 4])):
        try:
            content = (
                draw.choice([mutate_bytes, mutate_proto, mutate_proto])(content, draw) or content
            )
            onnx.ModelProto.FromString(content)
        except Exception:  # nothing more to change in its fields, or a text that is none
            break
    return content


# The reader.


def require_same(ours, theirs, where="model"):
    """All that the standard's parser sees is what our reader saw, and nothing else."""
    found = {field.name: value for field, value in theirs.ListFields()}
    known = {name: value for name, value in ours.items() if value != []}
    assert found.keys() == known.keys(), where
    assert not list(getattr(onnx, "unknown_fields", lambda _: [])(theirs))
    for name, value in known.items():
        field = theirs.DESCRIPTOR.fields_by_name[name]
        pairs = (
            zip(value, found[name], strict=True) if field.is_repeated else [(value, found[name])]
        )
        for our, their in pairs:
            if field.message_type:
                require_same(our, their, f"{where}.{name}")
            else:
                assert repr(our) == repr(their), f"{where}.{name}"


def test_the_reader_gives_a_graph_or_one_error_and_sees_what_the_standard_sees(recorded):
    require_same(parse_model(recorded), onnx.ModelProto.FromString(recorded))
    seen = {"graph": 0, "refused": 0}
    until = time.monotonic() + SECONDS / 4

    @given(st.integers(0, 2**48))
    @settings(
        max_examples=400, deadline=None, database=None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def one(seed):
        content = mutated(recorded, seed)
        try:
            read(content)
        except Malformed:
            seen["refused"] += 1
            return
        seen["graph"] += 1
        require_same(parse_model(content), onnx.ModelProto.FromString(content))

    one()
    while time.monotonic() < until:
        one()
    assert seen["graph"] > 5, "no mutation was a graph: too coarse"
    assert seen["refused"] > 5, "no mutation was refused: too tame"
    print(seen)


# Sessions, in a process of their own: its crash is what is looked for.

MOST_GIGABYTES = 2


class WithoutArena(onnxruntime.SessionOptions):
    def __init__(self):
        super().__init__()
        self.enable_cpu_mem_arena = False

    def add_session_config_entry(self, name, value):
        if name != "session.use_env_allocators":
            super().add_session_config_entry(name, value)


def run_mutants(file, seconds, seed):
    """Mutants of a graph, and single nodes of every operator, one after the other.

    Each is kept until it was run.
    """
    vars(onnx_engine)["available_memory"] = lambda: MOST_GIGABYTES * 2**30 // 3 * 4
    content, last = Path(file).read_bytes(), Path(file).with_name("last.onnx")
    if seed % 2:  # each array its own piece of the heap, which the C library then finds damaged
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_GIGABYTES * 2**30,) * 2)
        onnxruntime.SessionOptions = WithoutArena
    draw, until = random.Random(seed), time.monotonic() + seconds
    seen = {"answered": 0, "raised": 0, "refused": 0, "no session": 0}
    names = draw.sample(OPERATORS, len(OPERATORS))
    answered, i = set(), 0
    while time.monotonic() < until:
        i += 1
        made = (
            single(names[i % len(names)], draw)
            if i % 3
            else mutated(content, draw.randrange(2**48))
        )
        if made is None:
            continue
        last.write_bytes(made)
        print("RUN", names[i % len(names)] if i % 3 else "mutant", flush=True)
        try:
            graph = read(made)
            session = Session(graph, {}, threads=1 + i % 2)
        except Malformed:
            seen["refused"] += 1
            continue
        except Exception:
            seen["no session"] += 1
            continue
        sizes = {"rows": 2, "length": 5}
        inputs = {
            known.name: np.ones(
                [n if isinstance(n, int) else sizes.get(n, 3) for n in known.shape], known.dtype
            )
            for known in graph.inputs
            if all(isinstance(n, str) or n < 100 for n in known.shape) and known.dtype != "bfloat16"
        }
        try:
            session(inputs)
            seen["answered"] += 1
            answered.add(graph.nodes[0][0])
        except Exception:  # kernels refuse in many ways
            seen["raised"] += 1
    seen["operators"] = len(answered)
    if "FUZZ_SECONDS" in os.environ:
        print("never answered:", sorted({*OPERATORS} - answered), file=sys.stderr)
    print(
        "DONE",
        json.dumps(seen),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        flush=True,
    )


def pool(draw):
    """Arrays that kernels stumble over."""
    floats = draw.choice(["float32", "float32", "float32", "float64", "float16"])
    numbers = [draw.choice([*NUMBERS, 0, 1, 1, 2, 2, 3, -2]) for _ in range(draw.randrange(5))]
    made = [
        np.array(numbers, "int64"), np.array(draw.choice(numbers or [1]), "int64"),
        np.zeros((0, 3), floats),
        np.array([float("nan"), float("inf"), -0.0, 1e38], "float32"),
        np.zeros((1, 1, 4, 4), floats),
        np.arange(24).reshape(2, 3, 4).astype(floats),
        np.arange(48).reshape(2, 3, 2, 4).astype(floats),
        np.array([[True, False]] * 2), np.array(1.5, floats), np.array([1, 0, 2, 3], "int32"),
        np.ones(3, floats),
        np.array([[0, -1], [1, 2**40]], "int64"), np.arange(8).reshape(2, 4).astype(floats),
        np.array([3, 1], "uint8"), np.arange(72).reshape(3, 2, 3, 4).astype(floats),
    ]  # fmt: skip
    return [
        array
        for array in made
        if array.dtype != "float32" or not np.isnan(array).any() or draw.random() < 0.5
    ]


def single(operator, draw):
    """A graph of one node of an operator, with arguments and attributes of the right kinds."""
    schema = onnx.defs.get_schema(operator, 23)
    arrays = pool(draw)
    least, most = schema.min_input, min(schema.max_input, draw.choice([2, 3, 5, 8]))
    inits, inputs = [], []
    for i in range(draw.randint(least, max(least, most))):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)]
        if i >= least and draw.random() < 0.3:
            inputs.append("")
            continue
        fits = [
            array for array in arrays if f"tensor({NAMES[str(array.dtype)]})" in formal.types
        ] or arrays
        name = f"c{i}"
        inputs.append(name)
        inits.append(numpy_helper.from_array(np.ascontiguousarray(draw.choice(fits)), name))
    attributes, share = {}, draw.choice([0.02, 0.1, 0.4])
    for name, attribute in schema.attributes.items():
        if attribute.required or draw.random() < share:
            value = some_attribute(name, attribute, draw)
            if value is not None:
                attributes[name] = value
    outputs = [
        f"v{i}" if not i or draw.random() < 0.8 else ""
        for i in range(draw.randint(1, min(schema.max_output, 3)))
    ]
    try:
        node = helper.make_node(operator, inputs, outputs, **attributes)
    except Exception:  # an attribute of a kind that onnx does not guess
        return None
    # A look at the input keeps all of it from being constant.
    nodes = [node, helper.make_node("Identity", [outputs[0]], ["output.y"])]
    graph = helper.make_graph(
        nodes, "forward",
        [helper.make_tensor_value_info("input.x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("output.y", draw.choice([1, 1, 1, 7, 9]), None)], inits,
    )  # fmt: skip
    opset = helper.make_opsetid("", draw.choice([18, 20, 21, 22, 23, 23, 23]))
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


NAMES = {"float32": "float", "float64": "double"} | {
    name: name for name in ("int64", "int32", "uint8", "int8", "bool", "float16")
}


def some_attribute(name, attribute, draw):
    kinds = onnx.defs.OpSchema.AttrType
    number = lambda: draw.choice([0, 1, 1, 2, 2, 3, -1, -2, 100, 2**31, 2**62, -(2**63)])  # noqa: E731
    texts = [
        "constant",
        "reflect",
        "edge",
        "wrap",
        "nearest",
        "linear",
        "cubic",
        "SAME_UPPER",
        "VALID",
        "bilinear",
    ]
    texts += [
        "ij,jk->ik",
        "i...,->i",
        "tanh",
        "none",
        "align_corners",
        "bidirectional",
        "reverse",
        "add",
        "floor",
    ]
    return {
        kinds.INT: number,
        kinds.INTS: lambda: [number() for _ in range(draw.randrange(1, 5))],
        kinds.FLOAT: lambda: draw.choice([0.0, 0.5, 1.0, -1.0, 1e-12, 1e30]),
        kinds.FLOATS: lambda: [1.0] * draw.randrange(1, 3),
        kinds.STRING: lambda: draw.choice(texts),
        kinds.STRINGS: lambda: draw.choice([["Tanh", "Sigmoid", "Relu"], ["Tanh"], ["x"]]),
        kinds.TENSOR: lambda: numpy_helper.from_array(
            draw.choice(pool(draw)).reshape(-1)[:1].copy()
        ),
    }.get(attribute.type, lambda: None)()


def test_what_is_accepted_never_crashes_the_process(recorded, tmp_path):
    file = tmp_path / "graph.onnx"
    file.write_bytes(recorded)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_onnx_fuzz "
        "as t"
    )
    first = random.SystemRandom().randrange(2**32)
    for seed in (first, first + 1):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"{code}; t.run_mutants({str(file)!r}, "
                                                   f"{SECONDS * 3 / 8}, {seed})"],
            capture_output=True, text=True, timeout=SECONDS + 240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165"},
        )  # fmt: skip
        *_, last = done.stdout.strip().splitlines() or [""]
        kept = f"kept in {file.with_name('last.onnx')}"
        assert last.startswith("DONE"), (
            f"{done.returncode}, seed {seed}, after {last}, {kept}\n{done.stderr[-2000:]}"
        )
        seen, gigabytes = (
            json.loads(last.split(" ", 1)[1].rpartition(" ")[0]),
            float(last.rpartition(" ")[2]),
        )
        assert gigabytes < 2 * MOST_GIGABYTES, f"{gigabytes} GB, seed {seed}"
        assert seen["answered"], seen
        assert seen["raised"], seen
        assert seen["refused"], seen
        print(seen, gigabytes, done.stderr)
