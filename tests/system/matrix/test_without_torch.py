"""Where there is no torch.

What looks at a model before it is loaded works, on any Python, and says what is missing.

`make matrix`, or `nox -s light`, runs this with a model that the main environment saved.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from artifacts import flip
from click.testing import CliRunner

import mlflow_safeflavor
from mlflow_safeflavor.artifact.json_files import read_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.cli import main
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import EnvironmentMismatchError, IntegrityError, TrustError

SAVED = os.environ.get("SAFEFLAVOR_MATRIX_SAVED", "")
if not SAVED or find_spec("torch"):
    pytest.skip("what needs no torch is tested by `make matrix`", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE = REPOSITORY / "mlflow_safeflavor"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LIGHT = ("artifact", "environment", "load", "predict", "tasks")
LIGHT_SOURCES = [source for source in SOURCES if source.parts[len(PACKAGE.parts)] in LIGHT]


@pytest.fixture
def saved(tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(Path(SAVED) / "classifier", tmp_path / "model"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_this_python_can_read_every_module(source):
    compile(source.read_bytes(), str(source), "exec")


@pytest.mark.parametrize("source", LIGHT_SOURCES, ids=lambda path: path.stem)
def test_light_rooms_can_be_imported(source):
    importlib.import_module(".".join(source.relative_to(REPOSITORY).with_suffix("").parts))
    assert "torch" not in sys.modules


def test_a_model_can_be_inspected(saved):
    done = CliRunner().invoke(main, ["inspect", str(saved), "--pins"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "text-classification" in done.output
    assert re.search(r"^torch==2", done.output, re.MULTILINE)


def test_another_python_is_refused_by_name(saved):
    recorded = Environment.from_json(read_json(Layout(saved).environment))
    with pytest.raises(EnvironmentMismatchError) as caught:
        mlflow_safeflavor.load_model(
            str(saved), environment="error", model_config={"engine": "module"}
        )
    assert recorded.python in str(caught.value)
    assert ".".join(map(str, sys.version_info[:3])) in str(caught.value)
    assert "torch" in str(caught.value)


def test_a_missing_torch_is_named_before_it_fails_to_import(saved, caplog):
    with pytest.raises(ModuleNotFoundError, match="torch"):
        mlflow_safeflavor.load_model(str(saved), model_config={"engine": "module"})
    assert re.search(r"torch.*not installed", caplog.text), caplog.text


def test_the_graph_answers_and_the_module_is_named_with_what_it_needs(saved, caplog):
    model = mlflow_safeflavor.load_model(str(saved))
    assert "torch" not in caplog.text, "nobody needs it to serve a graph"
    rows = pd.DataFrame(
        {"buggy_code": ["return a == b", ""], "fixed_code": ["return a is b", "pass"]}
    )
    wanted = json.loads((Path(SAVED) / "answers.json").read_text())["classifier"][2:]
    found = model.predict(rows).to_dict(orient="records")
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx(
        [row["score"] for row in wanted], abs=1e-5
    )
    with pytest.raises(
        EnvironmentMismatchError, match=r"torch[\s\S]*requirements\.txt of the model"
    ):
        _ = model.module
    assert re.search(r"torch.*not installed", caplog.text), caplog.text


def test_a_damaged_model_is_refused(saved):
    flip(saved / "safeflavor" / "config.json")
    with pytest.raises(IntegrityError, match=r"safeflavor/config\.json"):
        mlflow_safeflavor.load_model(str(saved))


def test_a_pickle_is_refused():
    with pytest.raises(TrustError, match="Comparison"):
        mlflow_safeflavor.load_model(str(Path(SAVED) / "custom"))


def test_saving_says_what_is_missing():
    with pytest.raises(ModuleNotFoundError, match="torch"):
        mlflow_safeflavor.save_model(None, "model")
