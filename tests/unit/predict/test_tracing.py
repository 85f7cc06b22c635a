"""Spans of MLflow around predictions, and none where nobody asked for them."""

from __future__ import annotations

import threading
import time

import mlflow
import pytest

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.predict.request import Request, current_request
from mlflow_safeflavor.predict.tracing import TRACE, traced, traced_parts

pytestmark = pytest.mark.skipif(
    not hasattr(mlflow, "start_span_no_context"), reason="MLflow without tracing"
)


@pytest.fixture
def spans(monkeypatch, tracking):
    """Spans that end, in order; in a store of this test's own, which all could not make at once."""
    from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor

    ended = []
    plain = BaseMlflowSpanProcessor.on_end

    def on_end(self, span):
        ended.append(span)
        plain(self, span)

    monkeypatch.setattr(BaseMlflowSpanProcessor, "on_end", on_end)
    monkeypatch.delenv(TRACE, raising=False)
    return ended


def work(seconds=0.0):
    """As a forward does it: in another thread."""
    request = current_request.get()
    if request is None:
        return
    request.rows += 2

    def forward():
        began = time.monotonic()
        time.sleep(seconds)
        request.add([3, 4], began, time.monotonic() - began)

    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()


def test_nobody_asked(spans):
    with traced("t", "onnx"):
        assert current_request.get() is None
        work()
    assert spans == []


def test_inside_a_span_of_the_caller(spans):
    with mlflow.start_span("mine") as mine:
        with traced("fill-mask", "onnx"):
            work(0.05)
        assert current_request.get() is None
    assert [span.name for span in spans] == [
        "before the first forward",
        "forwards",
        "safeflavor fill-mask",
        "mine",
    ]
    before, forwards, prediction, _ = spans
    assert f"{prediction.parent.span_id:016x}" == mine.span_id
    assert before.parent.span_id == forwards.parent.span_id == prediction.context.span_id
    assert prediction.attributes["rows"] == "2"
    assert prediction.attributes["tokens"] == "7"
    assert prediction.attributes["engine"] == '"onnx"'
    assert forwards.end_time - forwards.start_time >= 40_000_000
    assert prediction.start_time <= before.start_time <= before.end_time == forwards.start_time
    assert forwards.end_time <= prediction.end_time


def test_where_the_variable_asks(spans, monkeypatch):
    monkeypatch.setenv(TRACE, "true")
    with traced("t", "module"):
        work()
    assert [span.name for span in spans][-1] == "safeflavor t"


def written(count):
    """A stream, whose forward begins with its first part."""
    work(0.05)
    yield from range(count)


def test_a_stream_has_one_span_and_is_nobodys_parent(spans):
    with mlflow.start_span("mine") as mine:
        parts = traced_parts("text-generation", "module", written(3))
        assert next(parts) == 0
        current = mlflow.get_current_active_span()
        assert current is not None
        assert current.span_id == mine.span_id
        assert current_request.get() is None
        with mlflow.start_span("between"):
            assert next(parts) == 1
        assert list(parts) == [2]
    names = [span.name for span in spans]
    assert names == [
        "between",
        "before the first forward",
        "forwards",
        "safeflavor text-generation",
        "mine",
    ]
    between, before, _, stream, _ = spans
    assert f"{between.parent.span_id:016x}" == f"{stream.parent.span_id:016x}" == mine.span_id
    assert before.parent.span_id == stream.context.span_id
    assert stream.attributes["tokens"] == "7"
    assert stream.start_time < between.start_time < between.end_time < stream.end_time


def test_a_stream_that_nobody_reads_to_its_end_or_that_fails(spans, monkeypatch):
    monkeypatch.setenv(TRACE, "true")
    parts = traced_parts("left", "module", written(3))
    next(parts)
    parts.close()
    with pytest.raises(ZeroDivisionError):
        list(traced_parts("failed", "module", (1 // i for i in [1, 0])))
    unread = traced_parts("unread", "module", written(3))
    del unread
    found = {span.name: span for span in spans if span.name.startswith("safeflavor")}
    assert [*found] == ["safeflavor left", "safeflavor failed"]
    assert found["safeflavor left"].attributes["forwards"] == "1"
    assert found["safeflavor left"].status.status_code.name != "ERROR"
    assert found["safeflavor failed"].status.status_code.name == "ERROR"


def test_a_stream_that_nobody_traces(spans):
    assert list(traced_parts("t", "module", written(3))) == [0, 1, 2]
    assert spans == []


def test_a_failure_is_the_spans(spans, monkeypatch):
    monkeypatch.setenv(TRACE, "true")
    with pytest.raises(InputError, match="no row"), traced("t", "module"):
        raise InputError("no row")
    [span] = [span for span in spans if span.name == "safeflavor t"]
    assert span.status.status_code.name == "ERROR"
    assert current_request.get() is None


@pytest.mark.parametrize("why", ["off", "fails"])
def test_a_trace_that_is_not_taken_costs_no_answer(spans, monkeypatch, why):
    monkeypatch.setenv(TRACE, "true")
    if why == "fails":
        monkeypatch.setattr("mlflow.tracing.fluent.provider.start_span_in_context", 0, raising=True)
    else:
        mlflow.tracing.disable()
    try:
        with traced("t", "module"):
            work()
        assert list(traced_parts("t", "module", written(3))) == [0, 1, 2]
    finally:
        mlflow.tracing.enable()
    assert spans == []
    assert current_request.get() is None


def test_below_the_span_of_a_client_of_the_server(spans, monkeypatch):
    pytest.importorskip("mlflow.tracing.distributed")
    monkeypatch.setenv(TRACE, "true")
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    token = current_request.set(Request("id", f"00-{trace}-{parent}-01"))
    try:
        with traced("t", "module"):
            work()
    finally:
        current_request.reset(token)
    prediction = spans[-1]
    assert f"{prediction.context.trace_id:032x}" == trace
    assert f"{prediction.parent.span_id:016x}" == parent
