"""Golden rows of one model on one host: one process answers all, the others the first."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from integration.test_sessions import bert_classifier

from mlflow_safeflavor import save_model

pytestmark = pytest.mark.slow

ROWS = ["the cat sat on the mat", "a dog", "red tree under green tree"]
# Through pyfunc, in a process that has imported no other loader than the artifact's own.
LOAD = """
import json, sys
import mlflow.pyfunc

def told(**asked):
    report = mlflow.pyfunc.load_model(sys.argv[1], model_config=asked).get_raw_model().report
    return report.golden_rows, report.answered_now, report.bit_identical, str(report)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture
def saved(root, tiny_tokenizer):
    path = root / "m"
    if not path.exists():
        given = {"tokenizer": tiny_tokenizer, "input_example": ROWS}
        save_model(bert_classifier(), path, **given, graph="require", rehearse=False)
    return path


@pytest.fixture
def process(clean_process, tmp_path, saved):
    """``process(code)``: what it printed last, as JSON."""
    env = {"MLFLOW_SAFEFLAVOR_CACHE": str(tmp_path / "cache")}

    def run(code):
        printed = clean_process(LOAD + code, str(saved), env=env).stdout
        return json.loads(printed.splitlines()[-1])

    return run


def test_of_processes_that_start_together_one_answers_all(process):
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(process, ["print(json.dumps(told()))"] * 3))
    rows = said[0][0]
    assert rows > len(ROWS)
    assert sorted(now for _, now, *_ in said) == [1, 1, rows]
    assert {(count, same) for count, _, same, _ in said} == {(rows, True)}
    for _, now, _, words in said:
        assert ("(1 now, all by another process here)" in words) == (now == 1)


def test_whatever_an_answer_depends_on_is_another_outcome(process):
    code = """
import os
found = {"first": told()[1], "again": told()[1], "threads": told(num_threads=1)[1]}
for name, asked in {"rehash": {"verify": "rehash"}, "structure": {"verify": "structure"},
                    "ignored": {"environment": "ignore"}, "module": {"engine": "module"}}.items():
    found[name] = min(told(**asked)[1], told(**asked)[1])
found["off"] = told(verify="off")[1]
print(json.dumps(found))
"""
    found = process(code)
    rows = found.pop("first")
    assert rows > len(ROWS)
    assert found.pop("again") == 1
    assert found.pop("off") == 0
    assert found == dict.fromkeys(found, rows)


def test_who_answers_the_first_row_otherwise_is_refused_all_the_same(process):
    code = """
first = told()[1]
from mlflow_safeflavor.errors import ParityError
from mlflow_safeflavor.graph import onnx_engine

run = onnx_engine.Session.__call__
onnx_engine.Session.__call__ = lambda self, inputs: {
    name: value + 1 for name, value in run(self, inputs).items()
}
try:
    told()
except ParityError as error:
    print(json.dumps([first, str(error)]))
"""
    first, problem = process(code)
    assert first > len(ROWS)
    assert "1 of 1 rows" in problem


def test_a_loader_that_is_not_the_artifacts_own_answers_all(clean_process, tmp_path, saved):
    code = """
import sys
import mlflow_safeflavor

for _ in range(2):
    report = mlflow_safeflavor.load_model(sys.argv[1]).report
    assert report.answered_now == report.golden_rows > 3, report
"""
    env = {"MLFLOW_SAFEFLAVOR_CACHE": str(tmp_path / "cache")}
    clean_process(code, str(saved), env=env)
