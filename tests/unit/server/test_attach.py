"""The next app that FastAPI makes gets a gate, and no other; what was asked wrongly is named."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlflow_safeflavor.errors import EnvironmentMismatchError, InputError
from mlflow_safeflavor.predict.options import MODEL_CONFIG
from mlflow_safeflavor.server.attach import attach, prepare
from mlflow_safeflavor.server.gate import Gate

fastapi = pytest.importorskip("fastapi")
APP = "mlflow.pyfunc.scoring_server.app"
MODEL: Any = SimpleNamespace(options=MODEL_CONFIG)


@pytest.fixture
def in_server(monkeypatch):
    """As while MLflow's server makes its app."""
    monkeypatch.setitem(sys.modules, APP, ModuleType(APP))
    monkeypatch.setattr(fastapi, "FastAPI", fastapi.FastAPI)


def test_elsewhere_nothing_is_touched(monkeypatch):
    monkeypatch.delitem(sys.modules, APP, raising=False)
    plain = fastapi.FastAPI
    attach(MODEL, {})
    assert fastapi.FastAPI is plain


def test_elsewhere_what_was_asked_for_is_not_dropped_in_silence(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, APP, raising=False)
    with caplog.at_level("WARNING"):
        prepare({"MLFLOW_SAFEFLAVOR_METRICS": "9090"})
    assert "MLFLOW_SAFEFLAVOR_METRICS needs MLflow's server on FastAPI" in caplog.text


def test_the_next_app_has_a_gate_and_the_one_after_has_none(in_server):
    plain = fastapi.FastAPI
    attach(MODEL, {})
    app = fastapi.FastAPI(title="mine")
    assert isinstance(app, plain)
    assert app.title == "mine"
    assert isinstance(app.build_middleware_stack(), Gate)
    assert fastapi.FastAPI is plain
    assert not isinstance(plain().build_middleware_stack(), Gate)


def test_of_several_models_the_first_one_has_the_gate(in_server):
    attach(MODEL, {})
    attach(MODEL, {})
    assert isinstance(fastapi.FastAPI().build_middleware_stack(), Gate)


def test_forked_workers_do_not_draw_the_same_numbers(in_server):
    """As of a fork: the state of numpy's generator is that of every other worker."""
    state = np.random.get_state()
    try:
        drawn = []
        for _ in range(2):
            np.random.set_state(state)
            prepare({})
            drawn.append(np.random.random())
        assert drawn[0] != drawn[1]
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize("place", ["everywhere", "0", "70000", "host:", ":x", "-1"])
def test_a_place_for_metrics_that_is_none(in_server, place):
    with pytest.raises(InputError, match="PORT or HOST:PORT") as error:
        prepare({"MLFLOW_SAFEFLAVOR_METRICS": place})
    assert repr(place) in str(error.value)


def test_without_prometheus_client(in_server, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(EnvironmentMismatchError, match="extra_pip_requirements"):
        attach(MODEL, {"MLFLOW_SAFEFLAVOR_METRICS": "9090"})
