"""Other releases of transformers and MLflow.

`make matrix`, or `nox -s matrix`, runs this in an environment of each.

The models are saved here and asked in the main environment, and the other way round. All compute
with the same torch on the same CPU, so equal means equal to the last bit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import mlflow
import pytest
from artifacts import forms_of
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from packaging.version import Version
from system.matrix import matrix_models
from system.matrix.matrix_models import GRAPHS, MODELS, ROWS, answers_of, differences, load, records

import mlflow_safeflavor
from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError

MAIN_PYTHON, SAVED_BY_MAIN = (
    os.environ.get(f"SAFEFLAVOR_MATRIX_{name}", "") for name in ("PYTHON", "SAVED")
)
if not (MAIN_PYTHON and SAVED_BY_MAIN):
    pytest.skip("other releases are tested by `make matrix`", allow_module_level=True)

MLFLOW = Version(mlflow.__version__)
SAYS_LISTS = Version("2.10") <= MLFLOW
"""Whether signatures have types for lists, and say of each column whether it is required."""

names = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _pickles(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")


@pytest.fixture(scope="session")
def here(tmp_path_factory):
    """The models as this environment saves them.

    What is not rehearsed is served, which is a clean process, too.
    """
    folder = tmp_path_factory.mktemp("here")
    matrix_models.save(folder, rehearse={"embedding"})
    return folder


@pytest.fixture(scope="session")
def main():
    """The models as the main environment saved them."""
    return Path(SAVED_BY_MAIN)


# Saved here


@names
def test_pyfunc_answers_as_the_native_model(here, name):
    model = mlflow.pyfunc.load_model(str(here / name))
    assert records(model.predict(ROWS[name])) == answers_of(here, name)


def test_one_column_without_a_name_takes_every_form(here):
    native, served = load(here / "embedding"), mlflow.pyfunc.load_model(str(here / "embedding"))
    wanted = answers_of(here, "embedding")
    for form, (data, body, count) in forms_of(matrix_models.TEXTS).items():
        if data is not None:
            assert near(records(native.predict(data)), wanted[:count]), form
            assert near(records(served.predict(data)), wanted[:count]), form
        # MLflow before 2.16 wants lists there, and before 2.10 lists of values.
        listed = Version("2.16") <= MLFLOW or (
            (SAYS_LISTS or "dicts" not in form) and "a value" not in form
        )
        if body is not None and (listed or form == "dicts"):
            rows = infer_and_parse_data(body, served.metadata.get_input_schema())
            assert near(records(served.predict(rows)), wanted[:count]), form


def near(found, wanted):
    """Whether these are the same answers; other company in a batch changes the last bits."""
    pairs = zip(found, wanted, strict=True)
    return all(row["embedding"] == pytest.approx(old["embedding"], abs=1e-5) for row, old in pairs)


@pytest.mark.parametrize("name", ["classifier", "custom"])
def test_a_server_answers_the_same_and_refuses_with_400(here, name, serve):
    with serve(here / name, env={"OMP_NUM_THREADS": "1"}) as server:
        answer = server.invoke({"dataframe_records": ROWS[name].to_dict(orient="records")})
        assert answer.status == 200, answer.text
        assert answer.json()["predictions"] == answers_of(here, name)
        first = ROWS[name].columns[0]
        good = ROWS[name].iloc[0].to_dict()
        refused = {
            "no text": {"dataframe_records": [{**good, first: None}]},
            "a number": {"dataframe_records": [{**good, first: 3}, good]},
            "a list": {"dataframe_records": [{**good, first: ["a"]}, good]},
        }
        if name != "custom":  # whose hooks read the rows
            for what, body in refused.items():
                answer = server.invoke(body)
                assert (answer.status, first in answer.text) == (400, True), (
                    f"{what}: {answer.status} {answer.text}"
                )
                assert not re.search(r'Traceback|File "|site-packages', answer.text), (
                    f"{what}: {answer.text}"
                )
            answer = server.invoke({"dataframe_records": [good], "params": {"max_length": -1}})
            assert (answer.status, "max_length" in answer.text) == (400, True), answer.text
            assert "Traceback" not in answer.text
        answer = server.invoke({"dataframe_records": [{"other": "a"}]})  # refused by MLflow itself
        assert (answer.status, first in answer.text) == (400 if SAYS_LISTS else 500, True), (
            answer.text
        )
        assert "Traceback" not in answer.text
        assert server.invoke({"dataframe_records": [good]}).status == 200


def test_a_logged_model_is_found_by_its_alias(tracking):
    with mlflow.start_run() as run:
        info = mlflow_safeflavor.log_model(
            name="embedding",
            registered_model_name="minilm",
            rehearse=False,
            **{"graph": "no", **matrix_models.embedding()},
        )
    if MLFLOW.major == 2:
        assert info.model_uri == f"runs:/{run.info.run_id}/embedding"
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("minilm", "champion", "1")
    rows = ROWS["embedding"]
    answers = [
        records(mlflow.pyfunc.load_model(uri).predict(rows))
        for uri in (info.model_uri, "models:/minilm@champion")
    ]
    answers.append(records(mlflow_safeflavor.load_model("models:/minilm@champion").predict(rows)))
    assert answers[0] == answers[1] == answers[2]


# Saved here, asked there


@pytest.fixture(scope="session")
def asked_there(here, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "answers.json"
    command = [MAIN_PYTHON, matrix_models.__file__, "ask", str(here), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text())


@names
def test_the_main_environment_answers_the_same(here, asked_there, name):
    told = asked_there[name]
    assert told["native"] == answers_of(here, name)
    assert told["pyfunc"] == answers_of(here, name)
    assert any("mlflow" in line or "transformers" in line for line in told["differences"])


# Saved there, asked here


@names
def test_a_model_of_the_main_environment_answers_the_same(main, name):
    model = load(main / name)
    assert records(model.predict(ROWS[name])) == answers_of(main, name)
    assert any("mlflow" in line or "transformers" in line for line in differences(main / name))


@names
@pytest.mark.skipif(not SAYS_LISTS, reason="MLflow before 2.10 cannot read newer signatures")
def test_a_model_of_the_main_environment_answers_the_same_by_pyfunc(main, name):
    model = mlflow.pyfunc.load_model(str(main / name))
    assert records(model.predict(ROWS[name])) == answers_of(main, name)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_the_main_environment_gives_the_bits_of_its_module(main, name):
    """As ``test_without_transformers.py`` asks of the same artifact without transformers."""
    model = load(main / name, model_config={"engine": "onnx"})
    assert model.report.engine == "onnx"
    assert records(model.predict(ROWS[name])) == answers_of(main, name)


def test_other_versions_are_an_error_where_that_is_asked_for(main):
    with pytest.raises(EnvironmentMismatchError, match=r"(mlflow|transformers)\b"):
        load(main / "embedding", environment="error", model_config={"engine": "module"})


# What MLflow 2.9 does not have


@pytest.mark.skipif(SAYS_LISTS, reason="only before MLflow 2.10")
def test_a_signature_that_mlflow_cannot_read_is_named(main):
    # MLflow's own, before anything of the model is imported
    with pytest.raises(TypeError, match="required"):
        mlflow.pyfunc.load_model(str(main / "embedding"))
    with pytest.raises(EnvironmentMismatchError, match=r"cannot read it[\s\S]*MLmodel[\s\S]*2\.10"):
        mlflow_safeflavor.verify_model(str(main / "embedding"), endpoint="http://127.0.0.1:9")


@pytest.mark.skipif(SAYS_LISTS, reason="only before MLflow 2.10")
def test_signatures_are_silent_about_lists_and_refuse_them_as_input(here, tmp_path):
    signature = mlflow.models.Model.load(str(here / "embedding")).signature
    assert signature.outputs is None
    assert mlflow.models.Model.load(str(here / "custom")).signature.outputs is None
    assert signature.inputs.input_names() == [0]
    assert {param.name for param in signature.params} == {
        "prompt",
        "truncate_dim",
        "normalize_embeddings",
        "precision",
        "max_length",
        "truncation",
    }
    given = matrix_models.custom()
    example = [{"buggy_code": "a", "fixed_code": "b", "tags": ["x", "y"]}]
    with pytest.raises(InputError, match=r"tags[\s\S]*2\.10"):
        mlflow_safeflavor.save_model(path=tmp_path / "model", **{**given, "input_example": example})
    assert not (tmp_path / "model").exists()
