"""Whatever is sent to a real server.

No 5xx or traceback from this package, and afterwards it answers as before.

FUZZ_SECONDS=600 pytest tests/integration/test_hostile_requests.py   ten minutes, not seconds
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest_plugins = "saved_models"
pytestmark = pytest.mark.serve

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20"))
GOOD = {"dataframe_records": [{"text": "the cat sat"}]}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)
texts = st.text(max_size=60) | st.sampled_from(
    ["", "\x00", "\ud800", "x" * 100_000, "[SEP] [MASK]", "\u202e", "👩‍👩‍👧" * 50]
)
rows = st.lists(
    st.fixed_dictionaries({"text": texts | anything}, optional={"other": anything}), max_size=4
)
split = st.fixed_dictionaries(
    {
        "columns": st.lists(st.sampled_from(["text", "other"]) | anything, max_size=3),
        "data": anything | st.lists(st.lists(texts)),
    },
    optional={"index": anything},
)
shapes = st.one_of(
    rows.map(lambda value: {"dataframe_records": value}),
    split.map(lambda value: {"dataframe_split": value}),
    (anything | rows | st.fixed_dictionaries({"text": st.lists(texts, max_size=4) | texts})).map(
        lambda value: {"inputs": value}
    ),
    (anything | rows).map(lambda value: {"instances": value}),
    st.dictionaries(
        st.sampled_from(["dataframe_records", "dataframe_split", "inputs", "instances", "x"]),
        anything,
    ),
)
values = anything | st.sampled_from([0, -1, 1, 2**31, 2**63, 1e308, "", "none", [], True])
params = st.dictionaries(
    st.sampled_from(["top_k", "function_to_apply", "max_length", "truncation", "unknown"])
    | st.text(max_size=5),
    values,
)
with_params = st.tuples(shapes, params).map(lambda both: {**both[0], "params": both[1]})
as_json = (shapes | with_params | anything).map(
    lambda value: json.dumps(value).encode("utf-8", "surrogatepass")
)
bodies = (
    as_json
    | st.binary(max_size=200)
    | st.tuples(as_json, st.integers(0, 50)).map(lambda cut: cut[0][: cut[1]])
)
types = st.sampled_from(
    [
        "application/json",
        "application/json; charset=latin-1",
        "text/csv",
        "text/plain",
        "a/b; c=d",
        "",
    ]
)


def test_nothing_that_is_sent_breaks_a_server(serve, saved):
    with serve(saved, env={"OMP_NUM_THREADS": "1"}) as server:
        before = server.invoke(GOOD)
        assert before.status == 200, before.text
        sent = []

        @given(bodies, types)
        @settings(
            max_examples=1000,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        def send(body, content_type):
            if time.monotonic() > until:
                return
            answer = server.invoke(body, content_type)
            sent.append(answer.status)
            # What MLflow's own parser fails over, too, and then with a trace of pandas'.
            assert answer.status < 500, f"{answer.status} {answer.text[:2000]}"
            # MLflow quotes what it was sent, and Hypothesis sends words of this file, too.
            quoted = f"{body!r} {content_type!r}"
            for word in ("Traceback", "stack_trace", "safeflavor"):
                assert word in quoted or word not in answer.text, answer.text[:2000]

        until = time.monotonic() + SECONDS
        send()
        # In CI hypothesis draws in each round what it drew in the first.
        while time.monotonic() < until and not settings().derandomize:
            send()
        assert server.invoke(GOOD) == before
        assert server.process.poll() is None
        assert {200, 400} <= set(sent), "neither good nor bad requests: the strategies are wrong"
        print(
            f"{len(sent)} requests: "
            f"{ ({status: sent.count(status) for status in sorted(set(sent))}) }"
        )


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        "fill-mask",
        "zero-shot-classification",
        "zero-shot-image-classification",
        "text-ranking",
        "automatic-speech-recognition",
        "llm/v1/chat",
    ],
)
def test_hostile_requests_beside_honest_callers_have_the_right_statuses(
    serve, tmp_path, minilm_folder, task
):
    benchmark = _benchmark()
    path = benchmark.save(task, tmp_path, **TINY)
    with serve(path, env={"OMP_NUM_THREADS": "1", "MLFLOW_SAFEFLAVOR_TIMEOUT": "60"}) as server:
        ask = benchmark.asking(int(server.url.rpartition(":")[2]))
        requests = {**benchmark.REFUSED[task], **benchmark.ALLOWED[task]}
        seen = benchmark.run(ask, benchmark.GOOD[task], requests, 0, 2 * len(requests))
        assert benchmark.wrong_statuses(seen, requests) == {}
        assert seen.statuses.keys() == {"honest", *requests}
        assert server.process.poll() is None


def test_each_task_of_the_benchmark_has_requests_of_all_three_kinds():
    benchmark = _benchmark()
    assert benchmark.GOOD.keys() == benchmark.REFUSED.keys() == benchmark.ALLOWED.keys()


def _benchmark():
    spec = importlib.util.spec_from_file_location(
        "hostile_benchmark", REPOSITORY / "benchmarks" / "hostile.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_benchmark"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module
