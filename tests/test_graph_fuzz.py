"""Whatever is written into graph.json: a graph or one error of ours; and what is a graph runs, or raises, and no more.

FUZZ_SECONDS=600 pytest tests/test_graph_fuzz.py     ten minutes instead of a few seconds
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from mlflow_safeflavor import operators
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.graph import GraphModule
from mlflow_safeflavor.graph_file import from_json, to_json
from mlflow_safeflavor.inventory import find_slots
from mlflow_safeflavor.recording import record

SECONDS = float(os.environ.get("FUZZ_SECONDS", "12"))
OPERATORS = [f"aten.{name}" for name in sorted(operators._ATEN.split())] + sorted(operators.SIZES)


class Small(nn.Module):
    """A little of everything that models do."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.words(input_ids))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        mask = attention_mask[:, None, None, :].bool()
        x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]
        x = torch.cat([x, x * 2], dim=1).mean(dim=1)
        return {"logits": self.out(nn.functional.gelu(x))}


def make_recorded():
    """A real graph as JSON, its constants, and inputs that it takes."""
    torch.manual_seed(0)
    module = Small().eval().requires_grad_(False)
    inputs = {"input_ids": torch.randint(20, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    slots = find_slots(module)
    graph, own = record(module, slots, [inputs])
    tensors = {slot.path: slot.tensor for slot in slots}
    return to_json(graph), [(own if c.own else tensors)[c.tensor].detach().clone() for c in graph.constants], inputs


# The parser.

numbers = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**40, 2**63 - 1, -(2**63), 2**63, 10**30, 0.0, 0.5, -1.5, 1e308])
references = st.builds(lambda kind, i: {kind: i}, st.sampled_from(["input", "constant", "call"]), st.integers(-1, 60))
words = st.builds(
    lambda kind, name: {kind: name},
    st.sampled_from(["text", "dtype", "layout", "memory_format", "float", "device", "eval"]),
    st.sampled_from(["float32", "int64", "bool", "complex64", "none", "mean", "ab,bc->ac", "inf", "here", "x()", ""]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | references | references | words | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=2),
    max_leaves=6,
)
calls = st.tuples(
    st.sampled_from(OPERATORS) | st.sampled_from(["operator.getitem", "os.system", "aten.add_.Tensor", "aten.x.y"]),
    st.lists(values, max_size=5),
    st.dictionaries(
        st.sampled_from(["dim", "dtype", "device", "keepdim", "alpha", "self"]) | st.text(max_size=3), values
    ),
    st.just(""),
).map(list)


def places(value, path=()):
    """Paths of all values in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def change(content, draw, call, value):
    """One mutation: drop, double, exchange or replace something, or write another call."""
    path = draw.choice([path for path in places(content) if path])
    *before, key = path
    parent = content
    for step in before:
        parent = parent[step]
    kind = draw.choice(["drop", "double", "swap", "value", "value", "call", "call"])
    if kind == "call":
        at = draw.randrange(len(content["calls"]) + 1) if isinstance(content.get("calls"), list) else 0
        if isinstance(content.get("calls"), list):
            content["calls"].insert(at, call)
    elif kind == "drop":
        del parent[key]
    elif kind == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == "swap" and isinstance(parent, list):
        other = draw.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = value


@pytest.fixture(scope="module")
def recorded():
    return make_recorded()


def test_the_parser_gives_a_graph_or_one_error(recorded):
    content, _, _ = recorded
    seen = {"graph": 0, "refused": 0}
    until = time.monotonic() + SECONDS / 2

    @given(st.lists(st.tuples(st.integers(0, 2**32), calls, values), min_size=1, max_size=3))
    @settings(
        max_examples=300, deadline=None, database=None,  # of which some are graphs
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def mutate(changes):
        mutated = copy.deepcopy(content)
        for seed, call, value in changes:
            change(mutated, random.Random(seed), copy.deepcopy(call), copy.deepcopy(value))
        try:
            graph = from_json(mutated)
        except StructureError:
            seen["refused"] += 1
            return
        seen["graph"] += 1
        assert from_json(json.loads(json.dumps(to_json(graph), allow_nan=False))) == graph

    mutate()
    while time.monotonic() < until:
        mutate()
    assert seen["graph"], "no mutation was a graph: too coarse"
    assert seen["refused"], "no mutation was refused: too tame"
    print(seen)


# What was accepted, in a process of its own: a crash of the interpreter is what is looked for.


def run_mutants(seconds, seed):
    """Operators with arguments that fit their schemas, one after the other; says each before it is run."""
    torch.set_num_threads(1)
    content, constants, inputs = make_recorded()
    constants = [*constants, *extremes()]
    before = [tensor.clone() for tensor in constants]
    draw, until, seen = random.Random(seed), time.monotonic() + seconds, {"answered": 0, "raised": 0, "refused": 0}
    for tensor in extremes():
        entry = {
            "tensor": "x",
            "own": True,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [*tensor.shape],
        }
        content["constants"].append(entry)
    names = [name for name in OPERATORS if name.startswith("aten.")]
    draw.shuffle(names)
    for i in range(10**9):
        if time.monotonic() > until:
            break
        mutated = copy.deepcopy(content)
        call = random_call(names[i % len(names)], mutated, draw)
        print("RUN", json.dumps(call), flush=True)
        mutated["calls"].append([*call, ""])
        mutated["outputs"] = {"y": {"call": len(mutated["calls"]) - 1}}
        try:
            graph = from_json(mutated)
        except StructureError:
            seen["refused"] += 1
            continue
        module = GraphModule(graph, constants)
        try:
            with torch.inference_mode(), module.bounded():
                module(**inputs)
            seen["answered"] += 1
        except Exception:  # operators refuse in many ways
            seen["raised"] += 1
        same = (torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(constants, before, strict=True))
        assert all(a.numel() == 0 or a.dim() == 0 or kept for a, kept in zip(constants, same, strict=True)), call
    print("DONE", json.dumps(seen), flush=True)


def extremes():
    """Tensors that kernels stumble over."""
    return [
        torch.tensor([-(2**63), 2**63 - 1, -1, 0]), torch.tensor([-1, -1, 0, 1]), torch.tensor([[True, False]] * 2),
        torch.tensor([float("nan"), float("inf"), -0.0, 1e38]), torch.zeros(0, 3), torch.zeros(1, 1, 4, 4),
        torch.randn(2, 3, 4, 4), torch.randn(2, 4), torch.tensor([0.5, 1], dtype=torch.bfloat16),
    ]  # fmt: skip


def random_call(name, content, draw):
    """A call whose arguments are of the kinds that the operator wants."""
    signature = operators.signature_of(name)
    if signature is None:
        return [name, [], {}]
    arguments = {k: random_value(v, content, draw) for k, v in signature.arguments.items()}
    given = {k: v for k, v in arguments.items() if k in signature.required or draw.random() < 0.6}
    args = []
    for k in list(signature.arguments)[: signature.positional]:
        if k not in given:
            break
        args.append(given.pop(k))
    return [name, args, given]


def random_value(wanted, content, draw):
    kind = wanted.kind()
    if kind == "OptionalType":
        return None if draw.random() < 0.4 else random_value(wanted.getElementType(), content, draw)
    if kind == "ListType":
        return [random_value(wanted.getElementType(), content, draw) for _ in range(draw.randrange(4))]
    if kind == "TensorType":
        pools = [("constant", len(content["constants"])), ("call", len(content["calls"]) - 1), ("input", 2)]
        pool, size = draw.choices(pools, [6, 3, 1])[0]
        return {pool: draw.randrange(size)}
    number = draw.choice([0, 1, 1, 2, 2, 3, 4, -1, -2, 7, 100, 2**31, 2**62, -(2**63), 2**63 - 1])
    return {
        "BoolType": draw.random() < 0.5,
        "FloatType": draw.choice([0.0, 0.5, 1.0, -1.0, 1e-12, 1e300]),
        "StringType": {"text": draw.choice(["none", "tanh", "constant", "reflect", "circular", "same", "ab,bc->ac"])},
        "ScalarTypeType": {"dtype": draw.choice(["float32", "int64", "bool", "bfloat16", "complex64", "uint8"])},
        "DeviceObjType": {"device": "here"},
        "LayoutType": {"layout": "strided"},
        "MemoryFormatType": {"memory_format": draw.choice(["contiguous_format", "channels_last", "preserve_format"])},
    }.get(kind, number)  # fmt: skip


def test_what_is_accepted_never_crashes_and_never_writes_to_constants():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_graph_fuzz as t"
    seed = random.SystemRandom().randrange(2**32)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}; t.run_mutants({SECONDS / 2}, {seed})"],
        capture_output=True, text=True, timeout=SECONDS + 240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    *_, last = done.stdout.strip().splitlines() or [""]
    assert last.startswith("DONE"), f"ended with {done.returncode}, seed {seed}, after {last}\n{done.stderr[-2000:]}"
    seen = json.loads(last.removeprefix("DONE"))
    assert seen["answered"], seen
    assert seen["raised"], seen
    print(seen)
