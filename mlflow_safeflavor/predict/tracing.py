"""Spans of MLflow's tracing, and so of OpenTelemetry, around predictions."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from typing import Any

import mlflow

from mlflow_safeflavor.predict.options import is_set
from mlflow_safeflavor.predict.request import Request, current_request

__all__ = ["TRACE", "traced", "traced_parts"]

TRACE = "MLFLOW_SAFEFLAVOR_TRACE"

_NUMBERS = ("rows", "pieces", "tokens", "forwards", "forward_seconds")
_END: Any = object()


def traced(task: str, engine: str) -> AbstractContextManager[Any]:
    """A span around one prediction, inside the caller's span or where the variable asks for it.

    It has numbers as attributes, and none of the rows; below it are the time before the first
    forward and the time from there on. Without either, this costs a microsecond.
    """
    return _spanned(task, engine) if _is_wanted() else nullcontext()


@contextmanager
def _spanned(task: str, engine: str) -> Iterator[None]:
    # A server's: when it arrived, and the client's span.
    request = current_request.get() or Request()
    token = current_request.set(request)
    try:
        with (
            _inside(request.traceparent),
            mlflow.start_span(
                f"safeflavor {task}", "CHAIN", {"task": task, "engine": engine}
            ) as span,
        ):
            try:
                yield
            finally:  # also of what failed, and of a stream that nobody read to its end
                span.set_attributes({name: getattr(request, name) for name in _NUMBERS})
                _add_parts(span, request)
    finally:
        current_request.reset(token)


def traced_parts(task: str, engine: str, parts: Iterator[Any]) -> Generator[Any, None, None]:
    """Parts of an answer, or answers to chunks, within one span.

    From when the first is asked for until the last is given, or the caller stops listening.
    """
    if not _is_wanted():
        yield from parts
        return

    def within() -> Generator[Any, None, None]:
        with traced(task, engine):
            yield from parts

    # In a context of its own: between two parts the caller goes on in its own, where this span
    # would else be the parent of whatever spans are opened meanwhile.
    own, spanned = copy_context(), within()
    try:
        while (part := own.run(next, spanned, _END)) is not _END:
            yield part
    finally:
        own.run(spanned.close)


def _add_parts(span: Any, request: Request) -> None:
    """Spans below that of a prediction, from times that were noted meanwhile."""
    # MLflow's span of nothing: this trace was not sampled, or tracing is off or cannot begin.
    if span.start_time_ns is None:
        return
    now, clock = time.time_ns(), time.monotonic()

    def moment(monotonic: float) -> int:
        begin: int = span.start_time_ns
        return max(begin, now - int(1e9 * (clock - monotonic)))

    arrived = moment(request.arrived)
    first = moment(clock if request.began is None else request.began)
    for name, start, end in (
        ("before the first forward", arrived, first),
        ("forwards", first, now),
    ):
        part = mlflow.start_span_no_context(name, parent_span=span, start_time_ns=start)
        part.end(end_time_ns=end)


def _inside(traceparent: str) -> AbstractContextManager[Any]:
    """The span of a client in another process, as the current one."""
    if traceparent:
        with suppress(ImportError):  # MLflow has it since release 3.9
            from mlflow.tracing import set_tracing_context_from_http_request_headers

            return set_tracing_context_from_http_request_headers({"traceparent": traceparent})
    return nullcontext()


def _is_wanted() -> bool:
    # MLflow has spans from 2.14 on.
    if not hasattr(mlflow, "start_span_no_context"):
        return False
    return mlflow.get_current_active_span() is not None or is_set(TRACE, os.environ)
