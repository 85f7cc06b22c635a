"""Where torch is installed and transformers is not.

Graphs give the bits that the module gave where it was saved.

`make matrix`, or `nox -s without_transformers`, runs this with the artifacts that every other leg
is asked about, too.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pytest
from system.matrix.matrix_models import GRAPHS, ROWS, answers_of, load, records

from mlflow_safeflavor.errors import SafeFlavorError

SAVED = os.environ.get("SAFEFLAVOR_MATRIX_SAVED")
if not SAVED or find_spec("transformers"):
    pytest.skip("graphs without transformers are tested by `make matrix`", allow_module_level=True)

MAIN = Path(SAVED)
names = pytest.mark.parametrize("name", GRAPHS)


@names
def test_the_native_model_gives_the_bits_of_the_module(name):
    model = load(MAIN / name, model_config={"engine": "onnx"})
    assert model.report.engine == "onnx"
    assert records(model.predict(ROWS[name])) == answers_of(MAIN, name)


@names
def test_pyfunc_gives_them_without_being_asked_for_a_graph(name):
    model = mlflow.pyfunc.load_model(str(MAIN / name))
    assert records(model.predict(ROWS[name])) == answers_of(MAIN, name)
    assert model._model_impl.model.report.engine == "onnx"


def test_a_server_gives_them(serve):
    rows = ROWS["classifier"].to_dict(orient="records")
    with serve(MAIN / "classifier", env={"OMP_NUM_THREADS": "1"}) as server:
        answer = server.invoke({"dataframe_records": rows})
    assert answer.status == 200, answer.text
    assert answer.json()["predictions"] == answers_of(MAIN, "classifier")


def test_the_module_cannot_be_had_and_the_error_says_why():
    with pytest.raises(SafeFlavorError, match="transformers"):
        load(MAIN / "classifier", model_config={"engine": "module"})
