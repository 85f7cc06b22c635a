"""The proof of a graph, with arithmetic in place of a module and of sessions."""

from __future__ import annotations

import weakref
from collections import Counter

import numpy as np
import pytest

from mlflow_safeflavor.graph.graph import Input
from mlflow_safeflavor.graph.proof import Refusal, prove

TEXT = [Input(name, "int64", ("rows", "length")) for name in ("input_ids", "attention_mask")]
EXAMPLE = {
    "input_ids": np.arange(2, 14).reshape(2, 6),
    "attention_mask": np.ones((2, 6), np.int64),
}


def forward(inputs):
    """One number a token, which nothing else changes."""
    return {"y": np.sqrt(inputs["input_ids"] * inputs["attention_mask"], dtype=np.float32)}


class Session:
    """A session that remembers what it was asked."""

    dtype, tolerance = "float32", 1e-4

    def __init__(self, run, asked):
        self.run, self.asked = run, asked

    def __call__(self, inputs):
        self.asked.append({name: array.shape for name, array in inputs.items()})
        return self.run(inputs)


@pytest.fixture
def proven():
    """``proven(by_threads, …)``: facts of a proof, and what each session was asked."""

    def run(by_threads, module=forward, inputs=TEXT, example=EXAMPLE, limit=6):
        asked = {threads: [] for threads in by_threads}
        alive = weakref.WeakSet()

        def opened(threads):
            assert not alive, "two sessions at once hold the packed weights twice"
            session = Session(by_threads[threads], asked[threads])
            alive.add(session)
            return session

        return prove(module, opened, list(by_threads), inputs, example, limit, seed=0), asked

    return run


def test_every_number_of_threads_is_asked_the_same_one_after_the_other(proven):
    facts, asked = proven({1: forward, 2: forward, 8: forward})
    assert (facts.threads, facts.batch, facts.padding) == (True, True, True)
    assert len(asked[2]) == facts.inputs
    assert asked[2] == asked[8]
    # the first is also asked for single rows of these
    assert not Counter(map(str, asked[2])) - Counter(map(str, asked[1]))


def with_other_bits(of):
    """The forward, off by one unit in the last place for inputs of one shape."""

    def run(inputs):
        y = forward(inputs)["y"]
        return {"y": np.nextafter(y, np.float32(9)) if y.shape == of else y}

    return run


@pytest.mark.parametrize("threads", [2, 8])
def test_other_bits_of_one_number_of_threads_count_for_all(proven, threads):
    sessions = {1: forward, 2: forward, 8: forward, threads: with_other_bits((7, 3))}
    assert proven(sessions)[0].threads is False


def test_inputs_that_the_module_refuses_are_asked_of_no_session(proven):
    def module(inputs):
        if inputs["input_ids"].shape[1] == 3:
            raise ValueError
        return forward(inputs)

    # its answers for what is left are still compared each with its own
    facts, asked = proven({1: forward, 2: with_other_bits((2, 3))}, module)
    assert facts.threads is True
    assert 3 not in facts.sizes["length"]
    assert facts.inputs == len(asked[2]) < len(proven({1: forward, 2: forward})[1][2])


def test_a_module_that_refuses_all_is_not_proven(proven):
    def module(inputs):
        raise ValueError

    with pytest.raises(Refusal, match="no input could be found"):
        proven({1: forward, 2: forward}, module)


def test_a_single_row_is_asked_once(proven):
    rows = []

    def run(inputs):
        ids = inputs["input_ids"]
        if len(ids) == 1 and ids.shape[1] > 10:  # of shorter ones two may be drawn alike
            rows.append(b"".join(array.tobytes() for array in inputs.values()))
        return forward(inputs)

    example = {"input_ids": np.arange(2, 42).reshape(2, 20)}
    example["attention_mask"] = np.ones_like(example["input_ids"])
    proven({1: run, 2: forward}, example=example, limit=20)
    assert len(rows) > 10
    assert len(set(rows)) == len(rows)


def test_a_row_that_depends_on_its_company_is_found(proven):
    def run(inputs):
        y = forward(inputs)["y"]
        return {"y": np.nextafter(y, np.float32(9)) if len(y) > 1 else y}

    facts, _ = proven({1: run, 2: run})
    assert (facts.threads, facts.batch) == (True, False)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_size_around_the_examples_is_tried_twice(proven, size):
    def flags(inputs):
        x = inputs["x"]
        return {"flags": x > 0, "total": x.sum(dtype=np.float64), "none": x[:, :0]}

    inputs = [Input("x", "float32", (2, "x_1"))]
    example = {"x": np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(2, size)}
    _, asked = proven({1: flags, 2: flags}, flags, inputs, example)
    grid = [shape["x"][1] for shape in asked[2]][1:-8]  # without the example, and drawn ones
    assert grid == list(dict.fromkeys((1, 2, size, size + 1, 2 * size)))


@pytest.mark.parametrize(("side", "most"), [(16, 32), (224, 5), (1100, 2)])
def test_large_images_are_asked_few_at_a_time(proven, side, most):
    """And those of the example, be they more."""

    def mean(inputs):
        return {"y": inputs["pixel_values"].mean((1, 2, 3))}

    shape = (2, 3, side, side)
    example = {"pixel_values": np.ones(shape, np.float32)}
    inputs = [Input("pixel_values", "float32", ("rows", *shape[1:]))]
    _, asked = proven({1: mean, 2: mean}, mean, inputs, example)
    rows = {asked["pixel_values"][0] for asked in asked[2]}
    assert {1, 2} <= rows
    assert most >= max(rows) > most // 2
