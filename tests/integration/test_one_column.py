"""Models of one text, image or sound.

One column without a name, in every form and on every path.
"""

from __future__ import annotations

import base64
import json

import mlflow
import numpy as np
import pandas as pd
import pytest
from artifacts import TEXTS, forms_of
from integration.test_audio import make_model as make_listener
from integration.test_audio import masked, sound, wav
from integration.test_images import SMALL, encoded, make_processor, pixels
from integration.test_images import make_model as make_viewer
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc.scoring_server import infer_and_parse_data

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError

pytest_plugins = "saved_models"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "model"
    mlflow_safeflavor.save_model(
        make_viewer(), path, processor=make_processor(size=SMALL), rehearse=False, graph="no"
    )
    return path, [encoded(pixels(seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "model"
    mlflow_safeflavor.save_model(
        make_listener(), path, processor=masked, rehearse=False, graph="no"
    )
    return path, [wav(sound(length)) for length in (3000, 4000, 5000)]


@pytest.fixture(params=["reader", "viewer", "listener"])
def kind(request):
    """A saved model and three cells, as Python and as JSON have them."""
    if request.param == "reader":
        return request.getfixturevalue("saved"), TEXTS, TEXTS
    path, files = request.getfixturevalue(request.param)
    return path, files, [base64.b64encode(content).decode() for content in files]


def answers_of(model, data):
    return json.loads(model.predict(data).to_json(orient="records", double_precision=15))


def is_same(found, wanted):
    labels = [row["label"] for row in found] == [row["label"] for row in wanted]
    return labels and [row["score"] for row in found] == pytest.approx(
        [row["score"] for row in wanted], abs=1e-5
    )


def test_every_form_has_the_same_answer_natively_and_by_pyfunc(kind):
    path, cells, texts = kind
    native, served = mlflow_safeflavor.load_model(path), mlflow.pyfunc.load_model(str(path))
    schema = served.metadata.get_input_schema()
    assert not schema.has_input_names()
    wanted = answers_of(native, cells)
    assert len({row["score"] for row in wanted}) == 3
    wrong = []
    for values in (cells, texts):
        for form, (data, body, count) in forms_of(values).items():
            paths = {} if data is None else {"native": (native, data), "pyfunc": (served, data)}
            if body is not None and values is texts:
                paths["what a server reads"] = served, infer_and_parse_data(body, schema)
            for name, (model, given) in paths.items():
                try:
                    found = answers_of(model, given)
                except MlflowException as error:
                    wrong.append(f"{form}, {name}: {error}")
                else:
                    wrong += [] if is_same(found, wanted[:count]) else [f"{form}, {name}: {found}"]
    assert wrong == []


TWO = {"id": ["7", "8"], "text": TEXTS[:2]}


@pytest.mark.parametrize("choice", ["error", "ignore"])
def test_several_columns_are_refused(saved, choice):
    model = mlflow_safeflavor.load_model(saved, model_config={"extra_columns": choice})
    for data in (
        pd.DataFrame(TWO),
        TWO,
        pd.DataFrame(TWO).to_dict("records"),
        {"id": "7", "text": "a"},
    ):
        with pytest.raises(
            InputError, match=r"several columns[\s\S]*columns 'id' and 'text'[\s\S]*hint: select it"
        ):
            model.predict(data)
    with pytest.raises(
        InputError, match=r"wrong number of values[\s\S]*where: row 0\n[\s\S]*found: 2"
    ):
        model.predict(np.array([["7", "a"]]))
    assert len(model.predict(pd.DataFrame(TWO)[["text"]])) == 2


def test_mlflow_itself_takes_the_first_of_several_columns(saved):
    """Before any model is asked, and without a word; docs/limits.md says so.

    A name is what makes it look for one.
    """
    model = mlflow.pyfunc.load_model(str(saved))
    assert answers_of(model, pd.DataFrame(TWO)) == answers_of(model, TWO["id"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame(), r"column is missing[\s\S]*where: one column\n[\s\S]*no columns"),
        ({}, r"column is missing[\s\S]*no columns"),
        ([{}], r"column is missing[\s\S]*no columns"),
        ([], r"no rows"),
        (pd.DataFrame({"review": []}), r"no rows"),
        (["a", None], r"value is missing[\s\S]*where: row 1\n"),
        ({"review": ["a", None]}, r"value is missing[\s\S]*where: row 1, column 'review'\n"),
        (["a", 5], r"not a text[\s\S]*where: row 1\n"),
        (["a", ["b"]], r"not a text[\s\S]*where: row 1\n"),
        ([{"review": "a"}, {"text": "b"}], r"column is missing[\s\S]*row 1, column 'review'"),
        ([{"review": "a"}, {"review": "b", "id": 1}], r"does not know[\s\S]*row 1, column 'id'"),
        ([{"review": "a"}, "b"], r"different shapes[\s\S]*where: row 1, column 'review'\n"),
        (
            5,
            r"cannot be read[\s\S]*where: one column\n[\s\S]*int 5[\s\S]*a DataFrame with one "
            r"column",
        ),
    ],
    ids=repr,
)
def test_what_is_refused_makes_sense_without_a_name(saved, data, message):
    with pytest.raises(InputError, match=message):
        mlflow_safeflavor.load_model(saved).predict(data)


def test_a_named_column_is_required(tmp_path, tiny_bert, tiny_tokenizer):
    given = {
        "tokenizer": tiny_tokenizer,
        "input_columns": {"text": "buggy_code"},
        "rehearse": False,
    }
    mlflow_safeflavor.save_model(tiny_bert(), tmp_path / "model", graph="no", **given)
    native, served = (
        mlflow_safeflavor.load_model(tmp_path / "model"),
        mlflow.pyfunc.load_model(str(tmp_path / "model")),
    )
    assert served.metadata.get_input_schema().input_names() == ["buggy_code"]
    named = pd.DataFrame({"buggy_code": TEXTS, "id": [1, 2, 3]})
    assert (
        answers_of(served, named)
        == answers_of(native, named[["buggy_code"]])
        == answers_of(native, TEXTS)
    )
    with pytest.raises(InputError, match="column 'buggy_code'"):
        native.predict({"text": TEXTS})
    with pytest.raises(MlflowException, match="missing inputs"):
        served.predict({"text": TEXTS})


def test_what_is_recorded(saved):
    spec = mlflow_safeflavor.load_model(saved).spec
    assert dict(spec.input_columns) == {"text": None}
    assert Model.load(str(saved)).signature.inputs.to_dict() == [
        {"type": "string", "required": True}
    ]
