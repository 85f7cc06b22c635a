"""What people who come from MLflow's own flavors try first."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import mlflow
import pandas as pd
import pytest
import torch
from artifacts import TEXTS
from mlflow.models import Model

import mlflow_safeflavor
from mlflow_safeflavor import load_model, log_model, mlflow_compat, save_model
from mlflow_safeflavor.errors import InputError, IntegrityError, PlacementError, TrustError
from mlflow_safeflavor.load.reload import Reload
from mlflow_safeflavor.machine import DEVICE_VARIABLE, default_device, is_plainly_cpu
from mlflow_safeflavor.save.example import split_example

pytest_plugins = "saved_models"

ROWS = pd.DataFrame({"text": TEXTS})
IS_3 = hasattr(mlflow, "search_logged_models")


def answers_of(model):
    return model.predict(ROWS).to_dict("records")


# Loading.


def test_the_raw_model_is_what_native_loading_returns(saved):
    """As with MLflow's flavors, each of which gives what its own ``load_model`` returns."""
    raw = mlflow.pyfunc.load_model(str(saved)).get_raw_model()
    assert type(raw) is type(load_model(saved))
    assert isinstance(raw.module, torch.nn.Module)
    assert answers_of(raw) == answers_of(load_model(saved))


def test_an_unknown_key_of_model_config_is_refused_natively(saved):
    with pytest.raises(InputError, match="Unknown key in model_config") as caught:
        load_model(saved, model_config={"timeout": 3, "time_out": 3})
    assert caught.value.where == "time_out"
    assert "timeout" in str(caught.value.wanted)


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", "cpu"), ("-1", "cpu"), ("0", 0), ("cuda:1", "cuda:1"), ("", "auto"), (" ", "auto")],
)
def test_mlflows_variable_names_the_default_device(text, device):
    """As ``mlflow.pytorch`` reads it (a name), and as ``mlflow.transformers`` does (an index)."""
    environ = {DEVICE_VARIABLE: text}
    assert default_device("auto", environ) == device
    assert [default_device(asked, environ) for asked in ("cuda", 0)] == ["cuda", 0]


def test_mlflows_variable_counts_for_both_ways_to_load(saved, monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "-1")
    assert is_plainly_cpu("auto")
    assert load_model(saved).report.device == "cpu"
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda:7")
    for load in (load_model, mlflow.pyfunc.load_model):
        with pytest.raises(PlacementError) as caught:
            load(str(saved))
        assert caught.value.where == DEVICE_VARIABLE
        assert caught.value.hint == f"unset {DEVICE_VARIABLE}"
    assert load_model(saved, device="cpu").report.device == "cpu"
    assert mlflow.pyfunc.load_model(str(saved), model_config={"device": "cpu"})
    monkeypatch.delenv(DEVICE_VARIABLE)
    assert load_model(saved)


# Pickling.


def test_a_loaded_model_is_pickled_as_where_it_lies(saved):
    native, pyfunc = load_model(saved, dtype="float64"), mlflow.pyfunc.load_model(str(saved))
    for model in (native, pyfunc):
        content = pickle.dumps(model)
        assert len(content) < 20_000  # no weights
        assert answers_of(pickle.loads(content)) == answers_of(model)
    assert isinstance(native.reload, Reload)
    assert pickle.loads(pickle.dumps(native)).reload.options == native.reload.options
    assert copy.deepcopy(native).scheduler is not native.scheduler


def test_a_pickled_model_answers_in_another_process(saved):
    model = load_model(saved)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(model.predict, ROWS).result().equals(model.predict(ROWS))


@pytest.mark.parametrize("found", ["nothing", "another model"])
def test_a_model_whose_folder_changed_is_not_pickled_or_loaded_again(
    saved, tmp_path, tiny_bert, tiny_tokenizer, found
):
    folder = shutil.copytree(saved, tmp_path / "model")
    model = load_model(folder)
    content = pickle.dumps(model)
    shutil.rmtree(folder)
    if found == "another model":
        save_model(tiny_bert(), folder, tokenizer=tiny_tokenizer, rehearse=False, graph="no")
    for attempt in (lambda: pickle.dumps(model), lambda: pickle.loads(content)):
        with pytest.raises(IntegrityError) as caught:
            attempt()
        assert (caught.value.found, caught.value.where) == (found, folder)
    assert load_model(saved)


# Logging.


@pytest.fixture
def warned(caplog):
    """Texts of MLflow's warnings."""
    with caplog.at_level(logging.WARNING):
        logger = logging.getLogger("mlflow")
        propagates, logger.propagate = logger.propagate, True
        yield lambda: [record.getMessage() for record in caplog.records]
        logger.propagate = propagates


def test_an_example_of_a_pickled_model_is_tried_without_a_warning(tracking, warned, monkeypatch):
    """Who logs it has just agreed to the pickle; who loads it later has not."""
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)

    class Nowhere(torch.nn.Linear):
        """Cannot be imported, so it is pickled."""

    info = log_model(
        Nowhere(4, 2).eval(),
        "model",
        task="raw",
        input_example={"input": torch.ones(2, 4).numpy()},
        allow_pickle=True,
        rehearse=False,
        graph="no",
    )
    assert not [text for text in warned() if "Failed to validate serving input" in text]
    with pytest.raises(TrustError):
        mlflow.pyfunc.load_model(info.model_uri)


@pytest.fixture
def logs(tracking, tiny_bert, tiny_tokenizer):
    """Logs a tiny classifier with arguments of a test's; returns MLflow's ``ModelInfo``."""
    return lambda *args, **more: log_model(
        tiny_bert(),
        *args,
        **{"tokenizer": tiny_tokenizer, "rehearse": False, "graph": "no", **more},
    )


def test_artifact_path_is_what_name_was_called(logs):
    info = logs(artifact_path="model")
    assert answers_of(mlflow.pyfunc.load_model(info.model_uri))
    with pytest.raises(InputError, match="under one name"):
        logs("model", artifact_path="model")
    assert logs("model")


def test_logs_leave_no_folders_to_search_for_modules(logs):
    """MLflow tries the example by the code of a folder that is gone when the log is done."""
    before = [*sys.path]
    logs(name="model", input_example=ROWS)
    assert sys.path == before


@pytest.mark.skipif(not IS_3, reason="before MLflow 3 models have no names")
def test_a_name_may_be_left_out(logs):
    assert answers_of(mlflow.pyfunc.load_model(logs().model_uri))


def test_before_mlflow_3_a_name_may_not_be_left_out(monkeypatch):
    monkeypatch.setattr(Model, "log", lambda artifact_path, flavor, **rest: None)
    assert mlflow_compat.log_name(None, "a") == {"artifact_path": "a"}
    with pytest.raises(InputError, match="Before MLflow 3") as caught:
        mlflow_compat.log_name(None, None)
    assert caught.value.hint == 'pass name="model"'
    assert mlflow_compat.log_name("model", None) == {"artifact_path": "model"}


def test_an_example_may_come_with_params(logs, warned):
    info = logs("model", input_example=(ROWS, {"top_k": 1}), example_no_conversion=True)
    assert not [text for text in warned() if "Failed to validate serving input" in text]
    model = mlflow.pyfunc.load_model(info.model_uri)
    assert model.input_example.to_dict("list") == ROWS.to_dict("list")
    sent = json.loads(
        model.metadata.get_serving_input(mlflow.artifacts.download_artifacts(info.model_uri))
    )
    assert sent["params"] == {"top_k": 1}
    assert load_model(info.model_uri).report.golden_rows > len(ROWS)
    with pytest.raises(InputError, match="top_q"):
        logs("model", input_example=(ROWS, {"top_q": 1}))


def test_two_rows_are_no_example_with_params():
    assert split_example(({"text": "a"}, {"text": "b"})) == (({"text": "a"}, {"text": "b"}), None)
    assert split_example(("a", "b")) == (("a", "b"), None)
    assert split_example((["a"], {})) == (["a"], {})


def test_a_signature_may_be_left_off(logs):
    info = logs("model", signature=False, input_example=ROWS)
    model = mlflow.pyfunc.load_model(info.model_uri)
    assert (info.signature, model.metadata.signature) == (None, None)
    assert answers_of(model) == answers_of(load_model(info.model_uri))


def test_default_requirements_know_where_a_model_is_from(tiny_bert):
    names = {
        line.partition("==")[0]
        for line in mlflow_safeflavor.get_default_pip_requirements(
            {"model": tiny_bert(), "head": Installed(1, 1)}, torch_index=None
        )
    }
    plain = mlflow_safeflavor.get_default_pip_requirements(torch_index=None)
    assert names == {line.partition("==")[0] for line in plain} | {"sentence-transformers"}
    conda = mlflow_safeflavor.get_default_conda_env(Installed(1, 1))
    [pip] = [part["pip"] for part in conda["dependencies"] if isinstance(part, dict)]
    assert any(line.startswith("sentence-transformers==") for line in pip)


class Installed(torch.nn.Linear):
    """As if a distribution had it beside torch."""

    __module__ = "sentence_transformers.somewhere"
