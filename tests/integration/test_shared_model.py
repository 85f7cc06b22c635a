"""Many callers, one saved model.

Engines, threads and options share one scheduler, and each answer is that of its caller alone.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import DeadlineError, InputError
from mlflow_safeflavor.graph import file
from mlflow_safeflavor.graph.engine import GraphEngine
from mlflow_safeflavor.predict import batching

WORDS = "the a cat dog sat ran on under mat tree red green return x y = + - ( ) def if else".split()


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 28))) for _ in range(200)]


@pytest.fixture
def saved(tiny_bert, tiny_tokenizer, tmp_path_factory):
    """A classifier that was saved once."""
    folder = tmp_path_factory.getbasetemp() / "scheduled"
    if not folder.exists():
        model = tiny_bert(
            num_labels=5, initializer_range=0.3, num_hidden_layers=1, intermediate_size=32
        )
        mlflow_safeflavor.save_model(model, folder, tokenizer=tiny_tokenizer, rehearse=False)
    return folder


PARAMS = [None, {"top_k": -1}, {"top_k": 2, "max_length": 9}, {"function_to_apply": "none"}]


def _requests(texts, count):
    draw = random.Random(1)
    return [
        (draw.choices(texts, k=draw.choice([1] * 9 + [4])), draw.choice(PARAMS))
        for _ in range(count)
    ]


def _answered_by(model, requests, threads):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda request: model.predict(*request), requests))


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["onnx", "module"])
def test_requests_from_32_threads(saved, texts, engine, count):
    """Each is answered as alone: by a graph to the bit, else within 1e-5.

    None lost, none swapped.
    """
    model = mlflow_safeflavor.load_model(saved, model_config={"engine": engine})
    known = {}
    requests = _requests(texts, count)
    for chosen, params in requests:
        for text in chosen:
            if (text, str(params)) not in known:
                known[text, str(params)] = model.predict([text], params).iloc[0].to_dict()
    answers = _answered_by(model, requests, 32)
    assert [list(found.index) for found in answers] == [[*range(len(of))] for of, _ in requests]
    # All that have the same columns at once: ten thousand comparisons of tables take longer than
    # the answers.
    for params in PARAMS:
        asked = [i for i in range(count) if requests[i][1] == params]
        found = pd.concat([answers[i] for i in asked], ignore_index=True)
        wanted = pd.DataFrame([known[text, str(params)] for i in asked for text in requests[i][0]])
        if engine == "onnx":
            assert found.to_dict() == wanted.to_dict()
        else:
            pd.testing.assert_frame_equal(found, wanted, check_exact=False, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("engine", "deterministic"), [("module", True), ("onnx", True), ("onnx", False)]
)
def test_the_same_bits_whatever_else_is_in_flight(saved, texts, engine, deterministic):
    model = mlflow_safeflavor.load_model(
        saved, model_config={"engine": engine, "deterministic": deterministic}
    )
    alone = [model.predict([text])["score"].item() for text in texts]
    assert model.predict(texts)["score"].tolist() == alone
    assert model.predict(texts[::-1])["score"].tolist() == alone[::-1]


@pytest.mark.parametrize("fact", [None, "batch", "padding"])
def test_deterministic_costs_nothing_where_the_same_bits_were_seen(
    saved, texts, tmp_path, monkeypatch, fact
):
    model = mlflow_safeflavor.load_model(saved)
    seen = {"dtype": "float32", "batch": True, "padding": True, fact: False}
    assert isinstance(model.engine, GraphEngine)
    engine: Any = GraphEngine(model.engine.session, keeps_bits=model.engine.keeps_bits)
    if fact is not None:
        monkeypatch.setattr(file, "_read_facts", lambda layout: {"proof": {"onnx": seen}})
        engine.keeps_bits = file.keeps_bits(model.files, "onnx", "float32")
    rows = []
    run = engine.session

    def count(inputs):
        rows.append(len(inputs["input_ids"]))
        return run(inputs)

    counted: Any = count
    engine.session, counted.graph = counted, run.graph
    strict = replace(model, options={**model.options, "deterministic": True}).answered_by(engine)
    strict.predict(texts[:20])
    assert (max(rows) > 1) == (fact is None)
    assert sum(rows) == 20


def test_what_a_forward_costs_is_measured_once_and_stored(saved, monkeypatch):
    stored = mlflow_safeflavor.load_model(saved).spec.model_config["forward_cost"]
    assert stored >= 1  # 0 would be measured again by every host, and each would make other batches
    monkeypatch.setattr(
        "mlflow_safeflavor.predict.batching.measure_forward_cost",
        lambda *_: pytest.fail("measured again"),
    )
    assert mlflow_safeflavor.load_model(saved).scheduler.forward_cost == stored
    assert (
        mlflow_safeflavor.load_model(
            saved, model_config={"forward_cost": 48}
        ).scheduler.forward_cost
        == 48
    )


def test_what_a_forward_costs_is_measured_where_it_is_not_known(saved, monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.predict.batching.measure_forward_cost", lambda *_: 77)
    model = mlflow_safeflavor.load_model(saved, model_config={"forward_cost": 0})
    assert model.scheduler.forward_cost == 77


@pytest.mark.parametrize(
    ("call", "token", "wanted"), [(2.0, 0.1, 16), (2.0, 0.05, 32), (0.0, 0.1, 1), (9.0, 0.0, 1)]
)
def test_the_measure_finds_what_a_call_costs(saved, monkeypatch, call, token, wanted):
    model, clock = mlflow_safeflavor.load_model(saved), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(inputs):
        clock[0] += call + token * inputs["input_ids"].size
        return model.engine(inputs)

    engine: Any = run
    rows = [{"text": "a"}, {"text": "the cat sat on the mat " * 4}]
    assert batching.measure_forward_cost(model.task, engine, rows, 128) == wanted
    assert batching.measure_forward_cost(model.task, engine, rows[:1], 128) == 1


def test_extra_columns_are_ignored_only_if_asked(tmp_path, tiny_bert, tiny_tokenizer, texts):
    table = pd.DataFrame({"text": texts[:3], "id": [1, 2, 3]})
    given = {
        "tokenizer": tiny_tokenizer,
        "input_columns": {"text": "text"},
        "rehearse": False,
        "graph": "no",
    }
    mlflow_safeflavor.save_model(tiny_bert(), tmp_path / "named", **given)
    with pytest.raises(InputError, match="columns that the model does not know"):
        mlflow_safeflavor.load_model(tmp_path / "named").predict(table)
    model = mlflow_safeflavor.load_model(
        tmp_path / "named", model_config={"extra_columns": "ignore"}
    )
    wanted = model.predict(table[["text"]])
    pd.testing.assert_frame_equal(model.predict(table), wanted)
    pd.testing.assert_frame_equal(model.predict(table.to_dict("list")), wanted)
    pd.testing.assert_frame_equal(model.predict(table.to_dict("records")), wanted)
    with pytest.raises(InputError, match="missing"):
        model.predict(table[["id"]])


def test_named_arrays_are_no_columns_to_ignore(tmp_path):
    arrays = {"input": np.ones((2, 3), np.float32)}
    mlflow_safeflavor.save_model(
        torch.nn.Linear(3, 1), tmp_path / "raw", task="raw", input_example=arrays, rehearse=False,
        graph="no",
        init_args={"in_features": 3, "out_features": 1},
    )  # fmt: skip
    model = mlflow_safeflavor.load_model(
        tmp_path / "raw", model_config={"extra_columns": "ignore"}, trust={"code"}
    )
    assert model.predict(arrays)["output_0"].shape == (2, 1)


def test_a_timeout_of_the_model_or_of_the_call(saved, texts):
    model = mlflow_safeflavor.load_model(saved, model_config={"timeout": 1e-6})
    with pytest.raises(DeadlineError, match="in time"):
        model.predict(texts)
    assert len(model.predict(texts, timeout=60)) == len(texts)
