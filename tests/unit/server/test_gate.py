"""The gate as ASGI servers see it, around an app of a few lines."""

import asyncio
import json
import sys
import threading
from typing import Any

import pytest

from mlflow_safeflavor.predict.request import current_request
from mlflow_safeflavor.server.gate import Gate

LIMITS: dict[str, Any] = {"max_queue": 0, "max_wait": 0.0, "max_body": 0, "timeout": 60.0}


def asked(body=b"{}", path="/invocations", **headers):
    """Scope, and the messages of a client that sends a body in two parts and waits."""
    scope = {
        "type": "http",
        "path": path,
        "headers": [
            (name.replace("_", "-").encode(), str(value).encode())
            for name, value in {"content_type": "application/json", **headers}.items()
            if value is not None
        ],
    }
    half = len(body) // 2
    return scope, [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
    ]


async def send(gate, scope, messages, *, hangs_up=None):
    """Ask, and give back status, headers and body; ``hangs_up``: an event, after which it does."""
    unread, sent = list(messages), []

    async def receive():
        if unread:
            return unread.pop(0)
        await (hangs_up or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def keep(message):
        sent.append(message)

    await asyncio.wait_for(gate(scope, receive, keep), 20)
    if not sent:
        return None, {}, b""
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


async def echo(scope, receive, respond):
    """Answers with the body that it was sent."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await respond({"type": "http.response.start", "status": 200, "headers": []})
    await respond({"type": "http.response.body", "body": body, "more_body": True})
    await respond({"type": "http.response.body", "body": b"!"})


class Slow:
    """Answers as ``echo`` does, once it may."""

    def __init__(self):
        self.may, self.there = asyncio.Event(), 0

    async def __call__(self, scope, receive, respond):
        self.there += 1
        await self.may.wait()
        await echo(scope, receive, respond)


def run(coroutine):
    return asyncio.run(coroutine)


def test_the_app_gets_the_body_and_its_answer_is_passed_on():
    told = []
    gate = Gate(echo, **LIMITS, told=[lambda request, status: told.append((request, status))])
    status, headers, body = run(send(gate, *asked(b'{"a": 1}')))
    assert (status, body) == (200, b'{"a": 1}!')
    [(request, status)] = told
    assert status == 200
    assert headers[b"x-request-id"].decode() == request.name
    assert not request.gone


def test_who_is_told_and_fails_keeps_nobody_from_being_told(caplog):
    told = []

    def fail(request, status):
        raise OSError("no space left")

    gate = Gate(echo, **LIMITS, told=[fail, lambda request, status: told.append(status)])
    with caplog.at_level("ERROR"):
        assert [run(send(gate, *asked()))[0] for _ in range(2)] == [200, 200]
    assert told == [200, 200]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["4bf92f35-77b3", "a.b:c_D"])
def test_a_request_keeps_the_name_that_it_came_with(name):
    _, headers, _ = run(send(Gate(echo, **LIMITS), *asked(x_request_id=name)))
    assert headers[b"x-request-id"] == name.encode()


@pytest.mark.parametrize("name", ["", "a b", '"}', "x" * 129, "a\nb"])
def test_a_name_that_a_log_cannot_hold_is_replaced(name):
    _, headers, _ = run(send(Gate(echo, **LIMITS), *asked(x_request_id=name)))
    assert len(headers[b"x-request-id"]) == 32


def test_other_paths_pass():
    async def app(scope, receive, respond):
        assert current_request.get() is None
        await echo(scope, receive, respond)

    gate = Gate(app, **{**LIMITS, "max_body": 1}, told=[lambda *_: pytest.fail("told")])
    status, headers, _ = run(send(gate, *asked(path="/ping")))
    assert (status, headers) == (200, {})


def test_the_app_finds_the_request_also_in_a_thread():
    async def app(scope, receive, respond):
        request = await asyncio.to_thread(current_request.get)
        assert request is not None
        assert request.name == "mine"
        assert request.until is not None
        assert request.until > request.arrived
        await echo(scope, receive, respond)

    assert run(send(Gate(app, **LIMITS), *asked(x_request_id="mine")))[0] == 200


@pytest.mark.parametrize("headers", [{}, {"content_length": 12}])
def test_a_body_that_is_too_long(headers):
    async def app(*_):
        pytest.fail("asked")

    gate = Gate(app, **{**LIMITS, "max_body": 11})
    status, answered, body = run(send(gate, *asked(b"x" * 12, **headers)))
    assert status == 413
    assert json.loads(body)["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "11 bytes (max_body)" in json.loads(body)["message"]
    assert answered[b"connection"] == b"close"


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("size", [12, 40, 4_500])
def test_whoever_sends_a_body_that_is_too_long_reads_the_answer(size, told):
    """It is all there before the rest of the body is read, and dropped; of that not all."""
    left = [b"x" * 5] * (size // 5) + [b"x" * (size % 5)] * bool(size % 5)
    gate = Gate(echo, **{**LIMITS, "max_body": 11})
    sent = []

    async def receive():
        assert gate._bytes <= 11
        if sent:
            assert json.loads(sent[1]["body"])["error_code"] == "INVALID_PARAMETER_VALUE"
            assert sent[1]["more_body"]
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def respond(message):
        sent.append(message)

    scope, _ = asked(**({"content_length": size} if told else {}))
    run(gate(scope, receive, respond))
    assert sent[0]["status"] == 413
    assert not sent[-1].get("more_body", False)
    dropped = size - sum(map(len, left))
    assert dropped == size or 4 * 11 < dropped <= 6 * 11
    assert gate._bytes == 0


def test_who_sends_no_more_than_was_too_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("mlflow_safeflavor.server.gate._IDLE", 0.05)
    scope, messages = asked(b"x" * 4, content_length=12)
    gate = Gate(echo, **{**LIMITS, "max_body": 11})

    async def story():
        asked = send(gate, scope, messages[:1], hangs_up=asyncio.Event())
        return await asyncio.wait_for(asked, 5)

    assert run(story())[0] == 413


def test_a_request_without_a_content_type():
    async def app(*_):
        pytest.fail("asked")

    status, _, body = run(send(Gate(app, **LIMITS), *asked(content_type=None)))
    assert status == 415
    assert "Content-Type" in json.loads(body)["message"]


def test_a_body_of_just_the_limit():
    gate = Gate(echo, **{**LIMITS, "max_body": 12})
    assert run(send(gate, *asked(b"x" * 12, content_length=12)))[0] == 200


def test_one_too_many_is_refused_and_the_others_are_answered():
    async def story():
        app = Slow()
        told = []
        gate = Gate(
            app,
            **{**LIMITS, "max_queue": 3},
            told=[lambda request, status: told.append(status)],
        )
        there = [asyncio.ensure_future(send(gate, *asked())) for _ in range(3)]
        while app.there < 3:
            await asyncio.sleep(0)
        status, headers, body = await send(gate, *asked())
        assert status == 503
        assert int(headers[b"retry-after"]) >= 1
        answer = json.loads(body)
        assert answer["error_code"] == "TEMPORARILY_UNAVAILABLE"
        assert "3 requests are at the model already" in answer["message"]
        app.may.set()
        assert [status for status, *_ in await asyncio.gather(*there)] == [200] * 3
        assert (await send(gate, *asked()))[0] == 200
        assert sorted(told) == [200] * 4 + [503]
        assert gate.in_flight == 0

    run(story())


def test_slow_clients_count_and_are_given_up():
    async def story():
        gate = Gate(echo, **{**LIMITS, "max_queue": 2, "timeout": 0.2})
        scope, messages = asked()
        # The first part of a body, and then nothing.
        slow = [asyncio.ensure_future(send(gate, scope, messages[:1], hangs_up=asyncio.Event()))]
        slow.append(
            asyncio.ensure_future(send(gate, scope, messages[:1], hangs_up=asyncio.Event()))
        )
        await asyncio.sleep(0.05)
        assert (await send(gate, *asked()))[0] == 503
        for status, headers, body in await asyncio.gather(*slow):
            assert (status, headers[b"connection"]) == (408, b"close")
            assert "0.2 s" in json.loads(body)["message"]
        assert (await send(gate, *asked()))[0] == 200
        assert (gate._reading, gate._bytes) == (0, 0)

    run(story())


def test_slow_clients_cannot_fill_the_memory():
    async def story():
        gate = Gate(echo, **{**LIMITS, "max_body": 10})
        scope, messages = asked(b"x" * 18)
        gone = asyncio.Event()
        slow = [
            asyncio.ensure_future(send(gate, scope, messages[:1], hangs_up=gone)) for _ in range(5)
        ]
        await asyncio.sleep(0.01)
        assert (await send(gate, *asked()))[0] == 503
        gone.set()
        await asyncio.gather(*slow)
        assert (await send(gate, *asked()))[0] == 200

    run(story())


def test_as_many_requests_run_at_a_time_as_share_a_batch(monkeypatch):
    there = threading.Barrier(16)
    intervals: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", intervals.append)

    async def waiting(scope, receive, respond):
        if scope["type"] == "http":
            await asyncio.to_thread(there.wait, 10)
            await echo(scope, receive, respond)

    async def story():
        gate = Gate(waiting, **LIMITS)
        assert await send(gate, {"type": "lifespan"}, []) == (None, {}, b"")
        return await asyncio.gather(*(send(gate, *asked()) for _ in range(16)))

    assert [status for status, *_ in run(story())] == [200] * 16
    assert intervals == [0.001]


def test_who_would_wait_too_long_is_refused(monkeypatch):
    async def story():
        app = Slow()
        gate = Gate(app, **{**LIMITS, "max_wait": 30.0})
        monkeypatch.setattr(gate._pace, "_seconds", 10.0)
        # As many as run at the same time are let in whatever they take: they wait for nobody.
        there = [asyncio.ensure_future(send(gate, *asked())) for _ in range(gate._together)]
        while app.there < gate._together:
            await asyncio.sleep(0)
        status, headers, _ = await send(gate, *asked())
        assert (status, headers[b"retry-after"]) == (503, b"%d" % (10 * (gate._together + 1)))
        app.may.set()
        await asyncio.gather(*there)

    run(story())


def test_a_client_that_hangs_up_is_noted_while_it_waits():
    async def story():
        app, hangs_up, told = Slow(), asyncio.Event(), []
        gate = Gate(
            app, **LIMITS, told=[lambda request, status: told.append((request.gone, status))]
        )
        there = asyncio.ensure_future(send(gate, *asked(), hangs_up=hangs_up))
        while not app.there:
            await asyncio.sleep(0)
        hangs_up.set()
        await asyncio.sleep(0.01)
        app.may.set()
        await there
        assert told == [(True, 499)]

    run(story())


def test_a_client_that_hangs_up_in_the_middle_of_its_body():
    async def app(*_):
        pytest.fail("asked")

    told = []
    gate = Gate(app, **LIMITS, told=[lambda request, status: told.append(status)])
    scope, messages = asked()
    status, *_ = run(send(gate, scope, [messages[0], {"type": "http.disconnect"}]))
    assert (status, told) == (None, [499])
    assert gate.in_flight == 0


def test_an_end_after_the_answer_is_no_hanging_up():
    told = []

    async def story():
        over = asyncio.Event()

        async def app(scope, receive, respond):
            await echo(scope, receive, respond)
            over.set()  # as uvicorn does once the last part was sent
            await asyncio.sleep(0.01)

        gate = Gate(app, **LIMITS, told=[lambda request, status: told.append(status)])
        await send(gate, *asked(), hangs_up=over)

    run(story())
    assert told == [200]


def test_any_503_says_when_to_come_again():
    async def app(scope, receive, respond):
        await respond({"type": "http.response.start", "status": 503, "headers": []})
        await respond({"type": "http.response.body", "body": b""})

    assert run(send(Gate(app, **LIMITS), *asked()))[1][b"retry-after"] == b"1"


def failing(status, body, *, rows=0, error=None):
    """An app as FastAPI makes it: an exception is answered with 500, and then raised."""

    async def app(scope, receive, respond):
        request = current_request.get()
        assert request is not None
        request.rows = rows
        headers = [(b"content-length", b"%d" % len(body))]
        await respond({"type": "http.response.start", "status": status, "headers": headers})
        await respond({"type": "http.response.body", "body": body[:3], "more_body": True})
        await respond({"type": "http.response.body", "body": body[3:]})
        if error is not None:
            raise error

    return app


def test_a_request_that_mlflow_cannot_parse_is_the_clients_fault():
    app = failing(500, b"Internal Server Error", error=TypeError("unhashable type: 'list'"))
    told = []
    gate = Gate(app, **LIMITS, told=[lambda request, status: told.append(status)])
    status, headers, body = run(send(gate, *asked()))
    assert (status, told, gate.in_flight) == (400, [400], 0)
    assert "TypeError: unhashable type: 'list'" in json.loads(body)["message"]
    assert int(headers[b"content-length"]) == len(body)


def test_an_app_that_fails_over_rows_is_not():
    app = failing(500, b"Internal Server Error", rows=1, error=RuntimeError("broken"))
    told = []
    gate = Gate(app, **LIMITS, told=[lambda request, status: told.append(status)])
    with pytest.raises(RuntimeError, match="broken"):
        run(send(gate, *asked()))
    assert (gate.in_flight, told) == (0, [500])


def test_an_error_that_is_no_exception_is_passed_on():
    status, _, body = run(send(Gate(failing(500, b"Internal"), **LIMITS), *asked()))
    assert (status, body) == (500, b"Internal")


def test_a_trace_goes_to_the_log_and_not_to_the_client(caplog):
    error = {"error_code": "BAD_REQUEST", "message": "no", "stack_trace": "File /srv/app.py"}
    with caplog.at_level("ERROR"):
        app = failing(400, json.dumps(error).encode())
        status, headers, body = run(send(Gate(app, **LIMITS), *asked()))
    assert status == 400
    assert json.loads(body) == {"error_code": "BAD_REQUEST", "message": "no"}
    assert int(headers[b"content-length"]) == len(body)
    assert "File /srv/app.py" in caplog.text


@pytest.mark.parametrize("body", [b"stack_trace", b'["stack_trace"]', b'{"a": "stack_trace"}'])
def test_other_errors_stay_as_they_are(body):
    assert run(send(Gate(failing(404, body), **LIMITS), *asked()))[2] == body
