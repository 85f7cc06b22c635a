"""The gate before MLflow's scoring server: whom it lets in, and what it sees of each request.

MLflow's server queues without end: of ten times more requests than it can answer, all are answered
too late, and so none. The gate answers 503 at once to those whose turn would not come in time.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from mlflow_safeflavor.predict.request import Request, current_request
from mlflow_safeflavor.predict.unfailing import unfailing
from mlflow_safeflavor.server.answer import Answer, Message, Receive, Send
from mlflow_safeflavor.server.pace import Pace

__all__ = ["Gate", "Told"]

App = Callable[[Message, Receive, Send], Awaitable[None]]
# Called once for each request that has ended, with the status of its answer.
Told = Callable[[Request, int], None]

# The status of a request whose client hung up, as nginx writes it; no answer is sent.
_CLIENT_GONE = 499
# Bodies of the largest size that may be on their way at a time; slow clients could fill the memory.
_BODIES = 4
# Requests that the app runs at a time, at least.
_TOGETHER = 16
_SWITCH = 0.001  # seconds
# What is read after an answer of 413: times the largest size, seconds in all, and seconds without
# anything.
_DROPPED, _LINGER, _IDLE = 4, 30.0, 2.0
_NAME = re.compile(rb"[\w.:-]{1,128}")


class Gate:
    """ASGI middleware around the scoring server's app; everything but ``/invocations`` passes.

    Args:
        app: The app.
        max_queue: Most requests that are there at a time; 0 for no limit.
        max_wait: Seconds that a request may have to wait for its answer, as far as can be told; 0
            for no limit.
        max_body: Bytes of a request; 0 for no limit.
        timeout: Seconds after which the app gives up a request.
        told: Told of each request that has ended.
    """

    def __init__(
        self,
        app: App,
        *,
        max_queue: int,
        max_wait: float,
        max_body: int,
        timeout: float,
        told: Sequence[Told] = (),
    ) -> None:
        self._app, self._timeout = app, timeout
        self._told = [unfailing(tell, "what is told of requests") for tell in told]
        self._max_queue, self._max_wait, self._max_body = max_queue, max_wait, max_body
        self._pace = Pace()
        self._reading = 0  # requests whose body is on its way
        self._bytes = 0  # that have come of these bodies
        # Requests that run at the same time and share batches.
        self._together = max(_TOGETHER, min(32, (os.cpu_count() or 1) + 4))

    @property
    def in_flight(self) -> int:
        """Requests that were let in and are not answered yet."""
        return self._pace.in_flight

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # of the server: before any request
            self._give_threads()
        if scope["type"] != "http" or scope["path"].rstrip("/") != "/invocations":
            await self._app(scope, receive, send)
            return
        traceparent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        request = Request(_name_of(scope), traceparent)
        # Found by whatever is done for it, in this task and in the threads that it starts.
        current_request.set(request)
        answer = Answer(request, send)
        try:
            await self._pass(answer, scope, receive)
        finally:
            for tell in self._told:
                tell(request, answer.status)

    def _give_threads(self) -> None:
        """Have the app run as many requests at a time as may share a batch."""
        # Asyncio's own number, cores + 4, leaves batches of two rows on a machine of two cores.
        pool = ThreadPoolExecutor(self._together, "safeflavor-request")
        asyncio.get_running_loop().set_default_executor(pool)
        # A thread whose forward has ended waits for the interpreter behind those that read and
        # write requests. Python lets each of them have it for 5 ms, as long as a forward takes.
        sys.setswitchinterval(_SWITCH)

    async def _pass(self, answer: Answer, scope: Message, receive: Receive) -> None:
        request = answer.request
        # Once before its body is read, which may be long, and once when it is there: others may
        # have come meanwhile.
        if await self._refused(answer):
            return
        if not any(name == b"content-type" for name, _ in scope["headers"]):
            # MLflow asks None for its parts, and answers 500.
            await answer.refuse(415, "A request needs a Content-Type, such as application/json")
            return
        self._reading += 1
        try:
            body = await asyncio.wait_for(self._body(scope, receive), self._timeout or None)
        except asyncio.TimeoutError:
            await answer.refuse(408, f"The request did not come within {self._timeout:g} s")
            return
        finally:
            self._reading -= 1
        if isinstance(body, _TooLong):
            why = f"A request may have {self._max_body} bytes (max_body)"
            await answer.refuse(413, why, then=partial(self._drop, receive) if body.more else None)
        elif isinstance(body, _Gone):
            answer.status = _CLIENT_GONE
        elif not await self._refused(answer):
            request.arrived = time.monotonic()
            request.until = request.arrived + self._timeout if self._timeout else None
            with self._pace.counted(), _listening(answer, body, receive) as replayed:
                await answer.of(self._app(scope, replayed, answer))
            if request.gone:
                answer.status = _CLIENT_GONE

    async def _refused(self, answer: Answer) -> bool:
        """Whether it is one too many, which it was told then."""
        there, seconds = self._pace.in_flight + self._reading, self._pace.expected()
        late = self._max_wait and there >= self._together and seconds > self._max_wait
        many = self._max_queue and there >= self._max_queue
        large = self._max_body and self._bytes > _BODIES * self._max_body
        if not (late or many or large):
            return False
        await answer.refuse(
            503,
            f"{there} requests are at the model already, and a new one would be answered in about "
            f"{seconds:.0f} s (max_queue {self._max_queue}, max_wait {self._max_wait:g} s; bodies "
            f"on their way together {_BODIES} times max_body)",
            max(1, math.ceil(seconds)),
        )
        return True

    async def _body(self, scope: Message, receive: Receive) -> bytes | _Gone | _TooLong:
        """The whole body, if it is not too long."""
        # It is held anyway: the app wants it whole.
        told = int(dict(scope["headers"]).get(b"content-length", 0))
        if self._max_body and told > self._max_body:
            return _TooLong(more=True)
        parts, size, more = [], 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return _Gone()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._bytes += len(parts[-1])
                more = message.get("more_body", False)
                if self._max_body and size > self._max_body:
                    return _TooLong(more)
        finally:
            self._bytes -= size
        return b"".join(parts)

    async def _drop(self, receive: Receive) -> None:
        """Read on for a while: whoever still sends when the connection ends reads no answer."""
        size, end, more = 0, time.monotonic() + _LINGER, True
        with suppress(asyncio.TimeoutError):
            while more and size <= _DROPPED * self._max_body and time.monotonic() < end:
                message = await asyncio.wait_for(receive(), _IDLE)
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


class _TooLong(NamedTuple):
    """In place of a body: it is longer than the limit; ``more``: the rest is still to come."""

    more: bool


class _Gone:
    """In place of a body: the client hung up before it had sent all of it."""


@contextmanager
def _listening(answer: Answer, body: bytes, receive: Receive) -> Iterator[Receive]:
    """``receive`` of ASGI that gives a body that was read, while a client that goes is noted."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def listen() -> Message:
        message = await receive()  # the body was read: all that can come is the end
        answer.request.gone = not answer.complete
        return message

    listener = asyncio.ensure_future(listen())

    async def replayed() -> Message:
        # Shielded: the app gives up listening once it has its answer, and the listener goes on.
        return unread.pop() if unread else await asyncio.shield(listener)

    try:
        yield replayed
    finally:
        listener.cancel()


def _name_of(scope: Message) -> str:
    """``X-Request-Id``, if it is one that can stand in a log; else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _NAME.fullmatch(given) else uuid.uuid4().hex
