"""Hints of what a model brings into MLflow's server, followed."""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType
from unittest.mock import MagicMock

import pandas as pd
import pytest
from hints.hint_rows import follows

from mlflow_safeflavor import load_model
from mlflow_safeflavor.errors import DeadlineError, EnvironmentMismatchError, InputError
from mlflow_safeflavor.predict.request import Request, current_request
from mlflow_safeflavor.server import shared
from mlflow_safeflavor.server.attach import attach, prepare

fastapi = pytest.importorskip("fastapi")
FastAPI = fastapi.FastAPI
pytest_plugins = "saved_models"
APP = "mlflow.pyfunc.scoring_server.app"


@pytest.fixture
def in_server(monkeypatch, tmp_path):
    """As while MLflow's server makes its app; folders of workers are in ``tmp_path``."""
    monkeypatch.setitem(sys.modules, APP, ModuleType(APP))
    monkeypatch.setattr(fastapi, "FastAPI", fastapi.FastAPI)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


@follows(
    "predict/deadline",
    "Nobody waits for the answer any more",
    "send fewer rows at once, run more workers, or raise MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT",
)
def test_more_time(saved):
    model = load_model(saved)
    frame = pd.DataFrame({"text": ["a cat", "a mat"]})
    token = current_request.set(Request("late", until=time.monotonic() - 1))
    try:
        with pytest.raises(DeadlineError, match="late"):
            model.predict(frame)
        current_request.set(Request("in time", until=time.monotonic() + 60))
        assert len(model.predict(frame)) == 2
    finally:
        current_request.reset(token)


@follows(
    "server/metrics",
    "Metrics need prometheus-client, which is not installed here",
    'save the model with extra_pip_requirements=["prometheus-client"], or unset '
    "MLFLOW_SAFEFLAVOR_METRICS",
)
def test_metrics_that_are_not_installed(in_server, saved, monkeypatch):
    model = load_model(saved)
    metrics = {"MLFLOW_SAFEFLAVOR_METRICS": "9090"}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "prometheus_client", None)
        with pytest.raises(EnvironmentMismatchError, match="extra_pip_requirements"):
            attach(model, metrics)
        attach(model, {})
    monkeypatch.setattr(fastapi, "FastAPI", FastAPI)  # the first one's gate stands
    # Not the real one, which would have this process count in files from now on.
    monkeypatch.setitem(sys.modules, "prometheus_client", MagicMock())
    attach(model, metrics)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners")
@follows(
    "server/shared",
    "The folder for metrics is not this user's alone",
    "remove it, or set TMPDIR to another folder",
)
def test_a_folder_that_others_write(in_server):
    metrics = {"MLFLOW_SAFEFLAVOR_METRICS": "9090"}
    folder = shared.shared_folder()
    folder.chmod(0o777)
    with pytest.raises(InputError, match="TMPDIR"):
        prepare(metrics)
    folder.rmdir()
    prepare(metrics)


@follows("server/attach", "safeflavor: %s needs MLflow's server on FastAPI")
def test_elsewhere_metrics_are_nowhere(in_server, monkeypatch, caplog):
    with caplog.at_level("WARNING"):
        prepare({"MLFLOW_SAFEFLAVOR_METRICS": "9090"})
        assert not caplog.records
        monkeypatch.delitem(sys.modules, APP)
        prepare({"MLFLOW_SAFEFLAVOR_METRICS": "9090"})
    assert "MLFLOW_SAFEFLAVOR_METRICS needs" in caplog.text
