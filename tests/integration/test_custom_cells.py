"""The custom task: what cells and answers may hold, and what hooks are given."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

import mlflow_safeflavor
from mlflow_safeflavor.errors import AnswerError, InputError, StructureError
from mlflow_safeflavor.tasks.cells import from_json, plain, to_json

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 2)

    def forward(self, x, shift=None):
        y = self.out(x)
        return {"y": y if shift is None else y + shift, "all": y.sum(0)}
"""
ROWS = [{"c": float(i)} for i in range(5)]


def numbers(rows, tokenizer):
    return {"x": torch.tensor([[float(len(str(row["c"])))] for row in rows])}


def shown(outputs, rows):
    return [
        {"y": y, "cell": type(row["c"]).__name__} for y, row in zip(outputs["y"], rows, strict=True)
    ]


@pytest.fixture
def save(user_code, tmp_path, monkeypatch):
    code, file = user_code("cells_net", NET)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")

    def make(example, preprocess=numbers, postprocess=shown, **options):
        torch.manual_seed(0)
        options = {
            "init_args": {},
            "code_paths": [file],
            "allow_pickle": True,
            "rehearse": False,
            **options,
        }
        options = {
            "preprocess": preprocess,
            "postprocess": postprocess,
            "input_example": example,
            **options,
        }
        mlflow_safeflavor.save_model(
            code.Net().eval(), tmp_path / "m", task="custom", graph="no", **options
        )
        return mlflow_safeflavor.load_model(tmp_path / "m", trust={"code", "pickle"})

    return make


CELLS = [
    b"\x00\x01",
    np.float32(1.5),
    np.int64(3),
    np.bool_(True),
    np.ones(3, np.float32),
    np.arange(6).reshape(2, 3),
    datetime.datetime(2026, 1, 2, 3, 4),
    datetime.date(2026, 1, 2),
    datetime.time(3, 4),
    pd.Timestamp("2026-01-02"),
    decimal.Decimal("1.50"),
    float("nan"),
    float("-inf"),
    None,
    [1, "a", {"b": None}],
    {"a": [b"x"]},
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{type(cell).__name__}")
def test_a_cell_comes_back_as_it_was(cell):
    back = from_json(json.loads(json.dumps(to_json(cell, "c"), allow_nan=False)))
    assert type(back) is type(cell)
    if isinstance(cell, np.ndarray):
        assert back.dtype == cell.dtype
        assert np.array_equal(back, cell)
    else:
        assert back == cell or (cell != cell and back != back)


@pytest.mark.parametrize(
    "cell", CELLS[:1] + CELLS[4:8] + CELLS[10:14], ids=lambda cell: f"{type(cell).__name__}"
)
def test_hooks_get_every_kind_of_cell(save, cell):
    loaded = save([{"c": cell}, {"c": cell}])
    found = loaded.predict([{"c": cell}])
    assert found["cell"].tolist() == [type(cell).__name__]
    assert isinstance(found["y"].iloc[0], list), "an array in an answer becomes a list"


def test_a_value_that_cannot_be_stored_is_named(save):
    with pytest.raises(InputError, match="cannot be stored") as caught:
        save([{"c": object()}])
    assert caught.value.where == "column 'c'"
    assert caught.value.found == "object"


def test_answers_become_plain():
    value = {
        "t": torch.ones(2, dtype=torch.bfloat16),
        "n": np.float32(0.5),
        "a": [np.arange(2)],
        "d": b"x",
        "m": None,
    }
    assert plain(value) == {"t": [1.0, 1.0], "n": 0.5, "a": [[0, 1]], "d": b"x", "m": None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float64", "float32"], ids=str)
def test_hooks_give_tensors_or_arrays_of_any_width_and_get_arrays(save, dtype):
    def pre(rows, tokenizer):
        x = numbers(rows, tokenizer)["x"]
        return {"x": x.to(dtype) if isinstance(dtype, torch.dtype) else x.numpy().astype(dtype)}

    def post(outputs, rows):
        outputs["y"] += 0  # nobody else's
        return [
            {"y": y, "kind": f"{type(y).__name__} of {outputs['y'].dtype}"} for y in outputs["y"]
        ]

    loaded = save(ROWS, pre, post)
    found = loaded.predict(ROWS)
    assert set(found["kind"]) == {"ndarray of float32"}
    assert np.allclose(found["y"].tolist(), loaded.module(**numbers(ROWS, None))["y"], atol=1e-6)


def test_an_array_of_something_else_than_numbers_is_named(save):
    with pytest.raises(StructureError, match="preprocess must give") as caught:
        save(ROWS, lambda rows, tokenizer: {"x": np.array([str(row["c"]) for row in rows], object)})
    assert caught.value.found == "x: ndarray of object"


def test_hooks_see_all_rows_of_a_request(save):
    seen: list[Any] = []

    def pre(rows, tokenizer):
        seen.append(len(rows))
        return numbers(rows, tokenizer)

    def post(outputs, rows):
        seen.append((len(rows), tuple(outputs["y"].shape)))
        order = outputs["y"][:, 0].argsort().argsort()
        return [{"rank": int(rank)} for rank in order]

    loaded = save(ROWS, pre, post, model_config={"batch_rows": 2})
    hooks = loaded.task.hooks
    seen.clear()
    hooks.preprocess, hooks.postprocess = pre, post  # those that were pickled count elsewhere
    found = loaded.predict([{"c": "x" * (i + 1)} for i in range(80)])
    assert seen == [80, (80, (80, 2))]
    assert sorted(found["rank"]) == list(range(80))


def test_hooks_get_params_and_declare_them(save, tmp_path):
    def post(outputs, rows, params):
        return [{"y": float(y[0]) * params["times"], "said": params["word"]} for y in outputs["y"]]

    loaded = save(ROWS, postprocess=post, params={"times": 2.0, "word": "a"})
    once = loaded.predict(ROWS, {"times": 1.0})["y"]
    assert np.allclose(loaded.predict(ROWS)["y"], 2 * once)
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    found = served.predict(pd.DataFrame(ROWS), params={"times": 3.0, "word": "b"})
    assert np.allclose(found["y"], 3 * once)
    assert set(found["said"]) == {"b"}
    for wrong, where in (({"time": 1.0}, "'time'"), ({"times": "x"}, "'times'")):
        with pytest.raises(InputError, match=where):
            loaded.predict(ROWS, wrong)


def test_answers_as_a_table_and_shared_tensors(save):
    def pre(rows, tokenizer):
        return {**numbers(rows, tokenizer), "shift": np.array([[0.5, -0.5]], np.float32)}

    def post(outputs, rows):
        return pd.DataFrame({"a": outputs["y"][:, 0], "b": outputs["y"][:, 1]}, index=range(7, 12))

    loaded = save(ROWS, pre, post)
    shifted = loaded.module.out(numbers(ROWS, None)["x"]) + torch.tensor([[0.5, -0.5]])
    assert np.allclose(loaded.predict(ROWS)[["a", "b"]], shifted.numpy(), atol=1e-6)


def test_an_output_that_is_not_one_a_row_is_named(save):
    with pytest.raises(StructureError, match="first dimension") as caught:
        save(
            ROWS, postprocess=lambda outputs, rows: [{"y": float(outputs["all"][0])} for _ in rows]
        )
    assert caught.value.where == "all"
    with pytest.raises(AnswerError, match="KeyError: 'z'"):
        save(ROWS, postprocess=lambda outputs, rows: [{"y": float(outputs["z"])} for _ in rows])


def test_missing_cells_pass_mlflow_too(save, tmp_path):
    save([{"c": 1.5}, {"c": float("nan")}])
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    assert served.predict(pd.DataFrame({"c": [float("nan"), 2.0]}))["cell"].tolist() == [
        "float",
        "float",
    ]


@pytest.mark.parametrize(
    "values", [[1, 2.5, 3], [[1.0], [2]], [1, "a"], {"a": [1, 2.5]}, [[1], None, [2.5]]], ids=str
)
def test_a_column_without_a_type_of_mlflows_takes_no_other_along(save, tmp_path, values):
    """MLflow would record one column without a name, and drop all but the first of each request."""

    def pre(rows, tokenizer):
        return numbers([{"c": (row["c"], row["values"], row["last"])} for row in rows], tokenizer)

    row = {"c": 1.0, "values": values, "last": "z"}
    loaded = save(
        [row, row],
        pre,
        lambda outputs, rows: [{"c": row["c"], "read": str(row["values"])} for row in rows],
    )
    served = mlflow.pyfunc.load_model(str(tmp_path / "m"))
    assert served.metadata.get_input_schema().input_names() == ["c", "values", "last"]
    assert (
        served.predict(pd.DataFrame([row]))["read"].tolist()
        == loaded.predict([row])["read"].tolist()
    )
