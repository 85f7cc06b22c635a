"""A request that is known: what its forwards cost, and that nobody waits for it any more."""

from __future__ import annotations

import time

import pytest

from mlflow_safeflavor.errors import DeadlineError
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.forwards import _count
from mlflow_safeflavor.predict.request import Request, current_request
from mlflow_safeflavor.predict.ticket import Ticket


@pytest.fixture
def request_():
    request = Request("mine")
    token = current_request.set(request)
    yield request
    current_request.reset(token)


class State:
    observer = None


def ticket(*costs):
    return Ticket([{}] * len(costs), costs, {}, ())


def test_a_forward_counts_for_each_request_that_has_a_part_in_it(request_):
    mine = ticket(3, 5)
    current_request.set(other := Request("other"))
    theirs = ticket(7)
    told = []
    state = State()
    state.observer = lambda costs, seconds: told.append((costs, seconds))  # type: ignore[assignment]
    began = time.monotonic()
    _count(state, [(mine, 0), (theirs, 0), (mine, 1)], began)  # type: ignore[arg-type]
    assert (request_.pieces, request_.tokens, request_.forwards) == (2, 8, 1)
    assert (other.pieces, other.tokens, other.forwards) == (1, 7, 1)
    assert request_.began == began
    assert [costs for costs, _ in told] == [[3, 7, 5]]
    _count(state, [(mine, 1)], began + 1)  # type: ignore[arg-type]
    assert (request_.pieces, request_.forwards, request_.began) == (3, 2, began)
    assert request_.queued_seconds == pytest.approx(began - request_.arrived)


def test_without_a_request_nothing_is_counted():
    _count(State(), [(ticket(1), 0)], time.monotonic())  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["gone", "late"])
def test_who_nobody_waits_for_is_too_late(request_, end):
    deadline = Deadline(None)
    assert deadline.is_watched
    assert not deadline.passed
    assert deadline.left() is None  # a lone request still runs in its caller's thread
    if end == "gone":
        request_.gone = True
    else:
        request_.until = time.monotonic()
    assert deadline.passed
    error = deadline.missed("1 of 2 pieces were answered")
    assert isinstance(error, DeadlineError)
    assert "request mine" in str(error)
    assert "1 of 2 pieces" in str(error)


def test_its_own_timeout_is_told_as_such(request_):
    deadline = Deadline(1e-9)
    assert deadline.passed
    assert "timeout" in str(deadline.missed())


def test_elsewhere_nobody_is_watched():
    assert not Deadline(None).is_watched
    assert not Deadline(None).passed
