"""Raw models: inputs beside named arrays, how nested outputs come back, which sizes may vary."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.types import ColSpec, TensorSpec
from mlflow.types.schema import Object

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.module.engine import named_tensors
from mlflow_safeflavor.tasks.sizes import free_sizes

NETS = """
import collections, dataclasses, torch
from torch import nn

class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))

    def forward(self, x, scale=None):
        return self.out(x)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        out, (h, c) = self.cell(x)
        return {"out": out, "aux": {"last": h[0]}, "states": [h, (c, None)], "rows": len(x)}

class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.pair = nn.GRU(4, 4, batch_first=True), nn.Bilinear(4, 4, 2)
        self.look = nn.MultiheadAttention(4, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        seen, _ = self.gru(x)
        seen, weights = self.look(seen, seen, seen)
        return self.pair(self.encoder(seen), seen), weights
"""
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
TABLE = pd.DataFrame(X, columns=list("abcd"))


def save(user_code, tmp_path, name, example, **options):
    code, file = user_code("nets", NETS)
    torch.manual_seed(0)
    module = getattr(code, name)().eval()
    path = tmp_path / "m"
    options = {"init_args": {}, "code_paths": [file], "rehearse": False, **options}
    mlflow_safeflavor.save_model(
        module, path, task="raw", input_example=example, graph="no", **options
    )
    with torch.inference_mode():
        return path, module, module(torch.tensor(X if name == "One" else X[None]))


def numbers(answer):
    return np.asarray(answer["output_0"], np.float32).ravel()


FORMS = {
    "array": X,
    "tensor": torch.tensor(X),
    "list": X.tolist(),
    "table": TABLE,
    "lists in a column": pd.DataFrame({"x": X.tolist()}),
    "dict": {"x": X},
}


@pytest.mark.parametrize("saved", ["array", "table", "dict"])
def test_a_forward_of_one_argument_takes_every_form(user_code, tmp_path, saved):
    path, _, wanted = save(user_code, tmp_path, "One", FORMS[saved])
    loaded = mlflow_safeflavor.load_model(path, trust={"code"})
    served = mlflow.pyfunc.load_model(str(path))
    wanted = wanted.numpy().ravel()
    known = [
        form for form in FORMS if saved != "table" or form not in ("lists in a column", "dict")
    ]
    for form in known:
        assert np.allclose(numbers(loaded.predict(FORMS[form])), wanted, atol=1e-6), form
    enforced = {
        "array": ["array", "table"],
        "table": ["table"],
        "dict": ["dict", "lists in a column"],
    }
    for form in enforced[saved]:
        assert np.allclose(numbers(served.predict(FORMS[form])), wanted, atol=1e-6), form


def test_a_table_is_answered_by_a_table(user_code, tmp_path):
    path, _, wanted = save(user_code, tmp_path, "One", TABLE)
    loaded = mlflow_safeflavor.load_model(path, trust={"code"})
    shuffled = TABLE[list("dbca")].set_axis(list("vwxyz"), axis=0)
    found = loaded.predict(shuffled)
    assert list(found.index) == list("vwxyz")
    assert np.allclose(numbers(found), wanted.numpy().ravel(), atol=1e-6)
    for wrong in (TABLE.rename(columns={"a": "e"}), TABLE[["a"]], TABLE.assign(e=1.0)):
        with pytest.raises(InputError, match="not those of the example"):
            loaded.predict(wrong)
    with pytest.raises(InputError, match="Not a column of numbers") as caught:
        loaded.predict(TABLE.assign(b="text"))
    assert caught.value.where == "column 'b'"
    spec = mlflow.models.Model.load(path).signature
    assert [(c.name, c.type.name) for c in spec.inputs.inputs] == [(c, "float") for c in "abcd"]
    assert [(c.name, c.type.name) for c in spec.outputs.inputs] == [("output_0", "double")]


def test_nested_outputs_keep_all_their_parts(user_code, tmp_path):
    path, module, _ = save(user_code, tmp_path, "Recurrent", {"x": X[None]})
    found = mlflow_safeflavor.load_model(path, trust={"code"}).predict({"x": X[None]})
    out, (h, c) = module.cell(torch.tensor(X[None]))
    wanted = {"out": out, "aux_last": h[0], "states_0": h, "states_1_0": c, "rows": torch.tensor(1)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.allclose(found[name], value.detach().numpy(), atol=1e-6), name


def test_the_layers_of_torch(user_code, tmp_path):
    path, _, (scores, weights) = save(user_code, tmp_path, "Many", X[None])
    found = mlflow_safeflavor.load_model(path, trust={"code"}).predict(X[None])
    assert np.allclose(found["output_0"], scores.numpy(), atol=1e-5)
    assert np.allclose(found["output_1"], weights.numpy(), atol=1e-5)


def test_outputs_by_name():
    import collections
    import dataclasses

    @dataclasses.dataclass
    class Answer:
        score: torch.Tensor
        parts: list[Any]

    one, two = torch.ones(1), torch.zeros(2)
    pair = collections.namedtuple("pair", "left right")
    assert named_tensors(one).keys() == {"output_0"}
    assert named_tensors((one, (two, None))).keys() == {"output_0", "output_1_0"}
    assert named_tensors(pair(one, two)).keys() == {"left", "right"}
    assert named_tensors(Answer(one, [two, {"a": one}])).keys() == {"score", "parts_0", "parts_1_a"}
    assert named_tensors({"logits": one, "past_key_values": ((one,),), "loss": None}).keys() == {
        "logits"
    }
    for outputs, where in (
        ({"a": {"b": object()}}, "a_b"),
        ((one, "text"), "output_1"),
        ({"a_b": one, "a": {"b": two}}, "a_b"),
    ):
        with pytest.raises(StructureError) as caught:
            named_tensors(outputs)
        assert str(caught.value.where).endswith(where)


def test_sizes_that_vary():
    weight = np.ones((4, 3))

    def pairs(arrays):
        ids, mask = arrays["ids"], arrays["mask"]
        return (ids * mask)[:, :7] @ np.ones((min(7, ids.shape[1]), 2)) + arrays["x"] @ weight[
            :, :1
        ]

    arrays = {"ids": np.ones((2, 7)), "mask": np.ones((2, 7)), "x": np.ones((2, 4))}
    assert free_sizes(pairs, arrays) == {"ids": [-1, -1], "mask": [-1, -1], "x": [-1, 4]}
    assert free_sizes(lambda a: a["x"].sum(), {"x": np.ones((2, 3, 4)), "n": np.float32(1)}) == {
        "x": [-1, -1, -1],
        "n": [],
    }


def test_the_signature_fixes_what_does_not_vary(user_code, tmp_path):
    path, _, _ = save(user_code, tmp_path, "Recurrent", {"x": X[None]})
    assert mlflow.models.Model.load(path).signature.inputs.inputs == [
        TensorSpec(np.dtype("float32"), (-1, -1, 4), "x")
    ]


def test_answers_that_are_one_list_a_row_are_an_object_for_spark(user_code, tmp_path):
    path, _, _ = save(user_code, tmp_path, "One", {"x": X})
    [spec] = mlflow.models.Model.load(path).signature.outputs.inputs
    assert isinstance(spec, ColSpec)
    assert spec.name is None
    assert isinstance(spec.type, Object)
    assert [p.name for p in spec.type.properties] == ["output_0"]


@pytest.mark.parametrize(
    "example", [pd.DataFrame({"a": [1.0, 2.0]}), np.array([[1.0], [2.0]])], ids=["table", "array"]
)
def test_numbers_of_a_float64_model_are_not_cut(tmp_path, example):
    module = torch.nn.Linear(1, 1).double()
    torch.nn.init.ones_(module.weight), torch.nn.init.zeros_(module.bias)
    mlflow_safeflavor.save_model(
        module,
        tmp_path / "m",
        task="raw",
        input_example=example,
        dtype="float64",
        rehearse=False,
        graph="no",
    )
    little = example + 1e-12
    for model in (
        mlflow_safeflavor.load_model(tmp_path / "m"),
        mlflow.pyfunc.load_model(str(tmp_path / "m")),
    ):
        answer = model.predict(little)["output_0"]
        assert np.array_equal(np.ravel(np.asarray(answer, dtype=float)), np.ravel(little))
