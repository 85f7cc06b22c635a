"""Errors of hooks and forwards reach their caller alone, by name, over HTTP without a trace."""

from __future__ import annotations

import sys
import threading
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import AnswerError, InputError

CODE = """
import sys
import torch

from mlflow_safeflavor.errors import InputError


class Net(torch.nn.Module):
    def __init__(self, size=1):
        super().__init__()
        self.linear = torch.nn.Linear(size, 1)

    def forward(self, x):
        if (x == 13).any():
            raise ArithmeticError("thirteen")
        if (x == 14).any():
            sys.exit("fourteen")
        if x.shape[0] > 1 and (x == 15).any():
            raise LookupError("fifteen is shy")
        return self.linear(x)


def pre(rows, tokenizer):
    if any(row["v"] == "ours" for row in rows):
        raise InputError("No such number", where="v")
    return {"x": torch.tensor([[float(row["v"])] for row in rows])}


def post(outputs, rows):
    if any(row["v"] == "7" for row in rows):
        raise KeyError("seven")
    return [{"y": float(value[0])} for value in outputs["output_0"]]
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Folders of one module as the tasks ``custom`` and ``raw``."""
    folder = tmp_path_factory.mktemp("failures")
    file = folder / "failing_code.py"
    file.write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import failing_code as code

        torch.manual_seed(0)
        given: dict[str, Any] = {
            "init_args": {"size": 1},
            "code_paths": [file],
            "rehearse": False,
            "graph": "no",
        }
        custom = {
            "task": "custom",
            "preprocess": code.pre,
            "postprocess": code.post,
            "input_example": [{"v": "1.5"}],
        }
        raw = {"task": "raw", "input_example": {"x": np.ones((2, 1), np.float32)}}
        for name, more in (("custom", custom), ("raw", raw)):
            mlflow_safeflavor.save_model(code.Net().eval(), folder / name, **given, **more)
        yield folder
    sys.modules.pop("failing_code")


@pytest.fixture(scope="module")
def model(artifacts):
    return mlflow_safeflavor.load_model(str(artifacts / "custom"), trust={"code"})


def values(*texts):
    return [{"v": text} for text in texts]


BAD = [
    ("1,5", InputError, "preprocess", ValueError),
    ("13", AnswerError, "forward", ArithmeticError),
    ("14", AnswerError, "forward", SystemExit),
    ("7", AnswerError, "postprocess", KeyError),
]


@pytest.mark.parametrize(("text", "kind", "part", "cause"), BAD, ids=[case[0] for case in BAD])
@pytest.mark.parametrize("at", [0, 5, 40], ids="row {}".format)
def test_an_error_names_its_part_and_its_row(model, text, kind, part, cause, at):
    rows = values(*["1"] * at, text, *["2"] * (41 - at))
    with pytest.raises(kind) as caught:
        model.predict(rows)
    assert type(caught.value) is kind
    assert caught.value.what.startswith(part)
    assert caught.value.where == f"row {at}"
    assert cause.__name__ in caught.value.found
    assert type(caught.value.__cause__) is cause
    assert len(model.predict(values("1", "2"))) == 2


def test_what_fails_only_beside_others_names_them(model):
    with pytest.raises(AnswerError, match="none of them alone") as caught:
        model.predict(values("15", "1"))
    assert str(caught.value.where).startswith("rows 0 to 1")
    assert len(model.predict(values("15"))) == 1


def test_an_error_that_a_hook_names_itself_stays_as_it_is(model):
    with pytest.raises(InputError, match="No such number") as caught:
        model.predict(values("1", "ours"))
    assert caught.value.where == "v"


def test_requests_of_one_batch_are_told_apart(model):
    """Bad requests between good ones, all at once: each gets its own answer or its own error."""
    texts = ["1", "13", "2", "1,5", "14", "3", "7", "4"] * 4
    found: list[Any] = [None] * len(texts)
    start = threading.Barrier(len(texts))

    def ask(i):
        start.wait()
        try:
            found[i] = len(model.predict(values("0", texts[i])))
        except mlflow_safeflavor.errors.SafeFlavorError as error:
            found[i] = (error.what.partition(" ")[0], error.where)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    parts = {case[0]: (case[2], "row 1") for case in BAD}
    assert found == [parts.get(text, 2) for text in texts]


def test_a_stream_ends_in_the_named_error_after_the_chunks_before_it(model):
    chunks = model.predict(iter([values("1"), values("2", "13"), values("3")]))
    assert len(next(chunks)) == 1
    with pytest.raises(AnswerError, match="forward failed") as caught:
        list(chunks)
    assert caught.value.where == "row 1"


def test_pyfunc_and_its_log(artifacts, caplog):
    served = mlflow.pyfunc.load_model(str(artifacts / "custom"))
    with pytest.raises(AnswerError) as caught:
        served.predict(pd.DataFrame(values("1", "7")))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "KeyError: 'seven'" in caplog.text, "whoever runs the server finds the cause nowhere"
    with pytest.raises(InputError):
        served.predict(pd.DataFrame(values("x")))


def test_raw(artifacts):
    model = mlflow_safeflavor.load_model(str(artifacts / "raw"), trust={"code"})
    with pytest.raises(InputError, match="forward refused the arrays"):
        model.predict({"x": np.ones((2, 3), np.float32)})
    for number, cause in ((13, ArithmeticError), (14, SystemExit)):
        with pytest.raises(AnswerError) as caught:
            model.predict({"x": np.full((1, 1), number, np.float32)})
        assert caught.value.where == "forward"
        assert type(caught.value.__cause__) is cause
    assert model.predict({"x": np.ones((2, 1), np.float32)})["output_0"].shape == (2, 1)


def test_what_a_task_raises_outside_its_forward_is_named_too(model, monkeypatch):
    class Panic(BaseException):
        """As tokenizers panics."""

    def panic(*args):
        raise Panic("of the tokenizer")

    monkeypatch.setattr(type(model.task), "encode", panic)
    with pytest.raises(AnswerError, match="of the tokenizer") as caught:
        model.predict(values("1"))
    assert type(caught.value.__cause__) is Panic


@pytest.mark.serve
@pytest.mark.parametrize("task", ["custom", "raw"])
def test_over_http_an_error_has_a_name_and_no_trace(serve, artifacts, task):
    cases = {
        "custom": [
            *[
                ({"dataframe_records": values("1", text)}, 400 if kind is InputError else 500)
                for text, kind, *_ in BAD
            ],
            ({"dataframe_records": values("1", "ours")}, 400),
        ],
        "raw": [
            ({"inputs": {"x": [[1.0, 2.0]]}}, 400),
            ({"inputs": {"x": [[13.0]]}}, 500),
            ({"inputs": {"x": [[14.0]]}}, 500),
        ],
    }
    good = {"custom": {"dataframe_records": values("1")}, "raw": {"inputs": {"x": [[1.0]]}}}[task]
    with serve(artifacts / task, env={"OMP_NUM_THREADS": "1"}) as server:
        before = server.invoke(good)
        assert before.status == 200, before.text
        for body, status in cases[task]:
            answer = server.invoke(body)
            assert answer.status == status, answer.text
            assert "stack_trace" not in answer.text
            assert "Traceback" not in answer.text
            assert "failing_code.py" not in answer.text
            assert answer.json()["message"]
        assert server.invoke(good) == before
        assert "ArithmeticError: thirteen" in server.log.read_text()
