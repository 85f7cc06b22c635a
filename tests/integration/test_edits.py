"""What MLflow's own calls and file systems change in a saved model afterwards."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from artifacts import TEXTS, edit_mlmodel
from click.testing import CliRunner
from mlflow.models import infer_signature, set_signature

from mlflow_safeflavor import cli, load_model, log_model
from mlflow_safeflavor.errors import IntegrityError

pytest_plugins = "saved_models"

ROWS = pd.DataFrame({"text": TEXTS})


@pytest.fixture
def edited(saved, tmp_path):
    """A copy of a saved model, for MLflow to edit in place."""
    return shutil.copytree(saved, tmp_path / "edited")


def test_a_signature_that_changes_no_answer_is_tolerated_and_told(edited, saved):
    wanted = load_model(saved).predict(ROWS)
    set_signature(str(edited), infer_signature(ROWS, wanted, params={"top_k": 1}))
    for model in (load_model(edited), mlflow.pyfunc.load_model(str(edited))):
        assert model.predict(ROWS).equals(wanted)
    report = load_model(edited).report
    assert [words.partition(",")[0] for words in report.tolerated] == [
        "MLmodel: its signature names its columns 'text'",
        "MLmodel: its signature no longer declares function_to_apply",
    ]
    assert "2 edits tolerated" in str(report)
    shown = CliRunner().invoke(cli.main, ["inspect", str(edited)]).output
    words = " ".join(word for word in shown.split() if word != "│")
    assert "tolerated MLmodel: its signature names its columns 'text'" in words
    assert "no longer declares function_to_apply" in words
    assert load_model(saved).report.tolerated == ()


def test_a_signature_that_may_change_answers_names_the_call(edited, saved):
    """MLflow would fill in its default of ``top_k`` in each request."""
    wanted = load_model(saved).predict(ROWS)
    set_signature(str(edited), infer_signature(ROWS, wanted, params={"top_k": 2}))
    for load in (load_model, mlflow.pyfunc.load_model):
        with pytest.raises(IntegrityError, match="top_k") as caught:
            load(str(edited))
        assert "mlflow.models.set_signature" in str(caught.value.hint)


def test_a_default_that_the_call_was_meant_for_is_given_at_save(
    tracking, tiny_bert, tiny_tokenizer
):
    """What the hint says."""
    info = log_model(
        tiny_bert(),
        "model",
        tokenizer=tiny_tokenizer,
        params={"top_k": 2},
        rehearse=False,
        graph="no",
    )
    model = mlflow.pyfunc.load_model(info.model_uri)
    assert model.predict(ROWS).equals(load_model(info.model_uri).predict(ROWS, {"top_k": 2}))


def test_edited_requirements_name_the_call(tracking, tiny_bert, tiny_tokenizer):
    given = {"tokenizer": tiny_tokenizer, "rehearse": False, "graph": "no", "torch_index": None}
    info = log_model(tiny_bert(), "model", **given)
    if not hasattr(mlflow.models, "update_model_requirements"):
        pytest.skip("this MLflow has no such call")
    uri = info.model_uri
    mlflow.models.update_model_requirements(uri, "add", ["tinydb==4.8.2"])
    for load in (load_model, mlflow.pyfunc.load_model):
        with pytest.raises(IntegrityError, match="requirements") as caught:
            load(uri)
        assert "mlflow.models.update_model_requirements" in str(caught.value.hint)
    (hinted,) = re.findall(r"log the model again with (\w+)=\[…\]", str(caught.value.hint))
    more: dict[str, Any] = {hinted: ["tinydb==4.8.2"]}
    info = log_model(tiny_bert(), "model", **given, **more)
    for load in (load_model, mlflow.pyfunc.load_model):
        assert load(info.model_uri)
    lines = Path(mlflow.pyfunc.get_model_dependencies(info.model_uri)).read_text().splitlines()
    assert "tinydb==4.8.2" in lines  # pinned


def test_added_libraries_name_the_call(edited, monkeypatch):
    """As ``add_libraries_to_model`` leaves a model, which asks an index for its wheels."""
    requirements = edited / "requirements.txt"
    shutil.copy2(requirements, edited / "original_requirements.txt")
    requirements.write_text("wheels/torch-2.0-py3-none-any.whl\n")
    (edited / "wheels").mkdir()
    (edited / "wheels/torch-2.0-py3-none-any.whl").touch()
    edit_mlmodel(edited, lambda content: content.update(wheels={"platform": "Linux"}))
    with pytest.raises(IntegrityError, match="requirements") as caught:
        load_model(edited)
    assert "add_libraries_to_model" in str(caught.value.hint)


JUNK = ["safeflavor/.nfs0000000012ab", "safeflavor/tokenizer/.DS_Store", "code/.gitkeep"]


def test_files_that_nothing_reads_are_ignored_and_told(edited, saved):
    for name in JUNK:
        (edited / name).write_bytes(b"\0junk")
    for model in (load_model(edited), mlflow.pyfunc.load_model(str(edited))):
        assert model.predict(ROWS).equals(load_model(saved).predict(ROWS))
    model = load_model(edited)
    assert set(model.report.tolerated) == {f"{name}: is ignored" for name in JUNK}
    assert model.tokenizer is not None  # made of what was kept of its folder


@pytest.mark.parametrize("name", ["safeflavor/more.json", "code/more.py", "code/.hidden.py"])
def test_any_other_file_is_refused(edited, name):
    (edited / name).touch()
    with pytest.raises(IntegrityError, match="was not there when the model was saved"):
        load_model(edited)


def test_junk_that_is_no_plain_file_is_refused(edited):
    os.mkfifo(edited / "code/.DS_Store")
    with pytest.raises(IntegrityError, match="is a pipe"):
        load_model(edited)


def test_an_empty_chunk_has_an_empty_answer(saved):
    """A filter may leave nothing of a chunk; the stream goes on, with the same columns."""
    model = load_model(saved)
    first, none, last = model.predict(chunk for chunk in (ROWS, ROWS[:0], ROWS))
    assert none.empty
    assert none.dtypes.to_dict() == first.dtypes.to_dict()
    assert first.equals(last)
    [alone] = model.predict(iter([ROWS[:0]]))
    assert [*alone] == [*first]
