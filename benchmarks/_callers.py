"""Callers of a scoring server, good and bad ones, over HTTP made by hand, as faults need sockets.

They run in a process of their own, so that what they compute does not count as the server's time.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

__all__ = ["BURST", "FAULTS", "Asked", "Question", "answer_commands"]

_PATIENCE = 90.0
"""Seconds until a request without an answer is given up; MLflow's own server gives up after 60."""
_FRESH = 1.0
"""Seconds that a connection may be idle and be used again; the server closes it after 5."""
_BURST_REQUESTS = 600
"""Most requests of a burst, which takes a second or less: each has a socket."""
_TRIES = 10
"""Most times that a bad request is sent until it is not refused as one too many."""
BURST = "burst of 10 times the capacity"


class Question(NamedTuple):
    """A request's body, and the predictions that are the right answer."""

    body: bytes
    predictions: list[Any]


class Asked(NamedTuple):
    """One request, and what became of it; times are those of ``time.monotonic``.

    Attributes:
        kind: "good", or its fault.
        due: When it should have been sent.
        began: When it was.
        ended: When its answer was there, or no hope of one.
        outcome: "right"; "refused", as it should be or as one too many; "wrong"; "left", by this
            caller; or "silent": there was no answer.
        status: Status of the answer; 0 for none.
        why: What is wrong.
        port: The caller's.
    """

    kind: str
    due: float
    began: float
    ended: float
    outcome: str
    status: int
    why: str
    port: int


class _Left(Exception):
    """This caller has hung up."""


_Sender = Callable[["Callers", socket.socket, bytes], Awaitable[None]]


class Callers:
    """Callers of the server at a port of loopback.

    Args:
        port: The server's.
        questions: What good requests ask.
        max_body: The server's cap, in bytes.
        seed: Of all that is drawn.
    """

    def __init__(
        self, port: int, questions: Sequence[Question], max_body: int, seed: int = 0
    ) -> None:
        self._port, self._questions, self._max_body = port, questions, max_body
        self._draw = random.Random(seed)
        self._asked: list[Asked] = []
        self._kept: list[tuple[socket.socket, float]] = []

    # Commands.

    async def wait_for_each(self, seconds: float, callers: int) -> list[Asked]:
        """Good requests of callers that wait for each answer: as many as can be answered."""
        until = time.monotonic() + seconds

        async def call() -> None:
            while time.monotonic() < until:
                await self._good(time.monotonic())

        await asyncio.gather(*(call() for _ in range(callers)))
        return self._taken()

    async def wait_for_none(
        self,
        start: float,
        seconds: float,
        rate: float,
        capacity: float,
        faults: Sequence[tuple[float, str]],
    ) -> list[Asked]:
        """Good requests at random moments, whatever became of those before, and faults.

        Args:
            start: When it begins.
            seconds: For how long.
            rate: Good requests a second.
            capacity: Requests a second that the server can answer.
            faults: Seconds from the start, and the fault.
        """
        due, at = [(start + after, name) for after, name in faults], start
        while (at := at + self._draw.expovariate(rate)) < start + seconds:
            due.append((at, "good"))
        for at, name in [*due]:
            if name == BURST:
                due.remove((at, name))
                count = min(_BURST_REQUESTS, round(10 * capacity))
                due += [(at + i / (10 * capacity), BURST) for i in range(count)]
        tasks = []
        for at, name in sorted(due):
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            work = self._fault(name, at) if name in FAULTS else self._good(at, name)
            tasks.append(asyncio.ensure_future(work))
        await asyncio.gather(*tasks)
        return self._taken()

    async def at_once(self, questions: Sequence[Question], sent: Callable[[], None]) -> list[Asked]:
        """Ask all of them, each on a connection of its own, and call ``sent`` when they are."""
        unsent = len(questions)

        async def send(callers: Callers, connection: socket.socket, request: bytes) -> None:
            nonlocal unsent
            await _send_whole(callers, connection, request)
            unsent -= 1
            if not unsent:
                sent()

        now = time.monotonic()
        await asyncio.gather(
            *(self._ask("good", now, _request(one.body), question=one, send=send)
              for one in questions)
        )  # fmt: skip
        return self._taken()

    def _taken(self) -> list[Asked]:
        asked, self._asked = self._asked, []
        while self._kept:
            self._kept.pop()[0].close()
        return asked

    async def leave(self, connection: socket.socket) -> None:
        """Hang up after a moment, as a closed program does or as a cut cable."""
        await asyncio.sleep(self._draw.uniform(0, 0.01))
        if self._draw.random() < 0.5:
            # Reset, instead of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Left

    # Requests.

    async def _good(self, due: float, kind: str = "good") -> None:
        one = self._draw.choice(self._questions)
        # As clients do: some use a connection again, some do not.
        keep = kind == "good" and self._draw.random() < 0.5
        await self._ask(kind, due, _request(one.body), question=one, keep=keep)

    async def _fault(self, name: str, due: float) -> None:
        """Once more, after a second, where it was refused as one too many before it was read."""
        for _ in range(_TRIES):
            one = self._draw.choice(self._questions)
            if name in _REFUSED:
                status, request = _REFUSED[name]
                asked = await self._ask(name, due, request(self._max_body), statuses=(status,))
            else:
                asked = await self._ask(
                    name, due, _request(one.body), question=one, send=_SENT[name]
                )
            if asked.status != 503:
                break
            await asyncio.sleep(1)
            due = time.monotonic()

    async def _ask(
        self,
        kind: str,
        due: float,
        request: bytes,
        *,
        question: Question | None = None,
        statuses: Sequence[int] = (),
        send: _Sender | None = None,
        keep: bool = False,
    ) -> Asked:
        """Ask one, and note what became of it."""
        began, name = time.monotonic(), f"{self._draw.getrandbits(64):016x}".encode()
        outcome, why, status, port = "silent", "", 0, 0
        connection = self._fresh() if keep else None
        try:
            if connection is None:
                connection = await self._connect()
            port = connection.getsockname()[1]
            request = request.replace(b"\r\n", b"\r\nX-Request-Id: " + name + b"\r\n", 1)
            answer = await asyncio.wait_for(
                self._answer(connection, request, send or _send_whole), _PATIENCE
            )
            status = answer.status
            outcome, why = _judged(answer, name, question, statuses)
        except _Left:
            outcome = "left"
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            why = f"no answer: {type(error).__name__} {error}".strip()
        except (ValueError, LookupError) as error:
            outcome, why = "wrong", f"no HTTP or no JSON: {error!r}"
        ended = time.monotonic()
        asked = Asked(kind, due, began, ended, outcome, status, why, port)
        self._asked.append(asked)
        if connection is not None and keep and outcome == "right":
            self._kept.append((connection, ended))
        elif connection is not None:
            connection.close()
        return asked

    async def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        try:
            loop = asyncio.get_running_loop()
            await asyncio.wait_for(
                loop.sock_connect(connection, ("127.0.0.1", self._port)), _PATIENCE
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def _fresh(self) -> socket.socket | None:
        """A connection that was used a moment ago, and whose server lives."""
        while self._kept:
            connection, since = self._kept.pop()
            try:
                # Nothing is there to read unless the server has closed it.
                if time.monotonic() - since < _FRESH:
                    connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return connection
            except OSError:
                pass
            connection.close()
        return None

    async def _answer(self, connection: socket.socket, request: bytes, send: _Sender) -> _Answer:
        """Send a request and read its answer, which may come before the request was read."""
        sending = asyncio.ensure_future(send(self, connection, request))
        reading = asyncio.ensure_future(_read_answer(connection))
        try:
            await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and isinstance(sending.exception(), _Left):
                sending.result()
            return await reading
        finally:
            for task in (sending, reading):
                task.cancel()
            await asyncio.gather(sending, reading, return_exceptions=True)


class _Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes


async def _read_answer(connection: socket.socket) -> _Answer:
    loop, data = asyncio.get_running_loop(), bytearray()

    async def until(enough: Callable[[], bool]) -> None:
        while not enough():
            part = await loop.sock_recv(connection, 2**18)
            if not part:
                raise EOFError(f"closed after {len(data)} bytes")
            data.extend(part)

    await until(lambda: b"\r\n\r\n" in data)
    head, _, _ = bytes(data).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)
    }
    size = len(head) + 4 + int(headers[b"content-length"])
    await until(lambda: len(data) >= size)
    return _Answer(int(first.split()[1]), headers, bytes(data[len(head) + 4 :]))


def _judged(
    answer: _Answer, name: bytes, question: Question | None, statuses: Sequence[int]
) -> tuple[str, str]:
    """Outcome, and what is wrong."""
    said = f"{answer.status} {answer.body[:300]!r}"
    if answer.headers.get(b"x-request-id") != name:
        return "wrong", f"the answer to another request: {said}"
    if answer.status >= 400 and any(
        trace in answer.body for trace in (b"Traceback", b"stack_trace", b'File "')
    ):
        return "wrong", f"a traceback: {said}"
    if answer.status == 503:
        # One too many, of whatever kind it is.
        after = answer.headers.get(b"retry-after", b"")
        return ("refused", "") if after.isdigit() and int(after) else ("wrong", "no Retry-After")
    if answer.status in statuses:
        return "refused", ""
    if question is None or answer.status != 200:
        return "wrong", f"wanted {statuses or 200}: {said}"
    if json.loads(answer.body).get("predictions") != question.predictions:
        return "wrong", f"other predictions: {said}"
    return "right", ""


# Ways to send a request.


async def _send_whole(callers: Callers, connection: socket.socket, request: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, request)


async def _send_slowly(callers: Callers, connection: socket.socket, request: bytes) -> None:
    """The body byte by byte, in about two seconds."""
    loop, start = asyncio.get_running_loop(), request.index(b"\r\n\r\n") + 4
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await loop.sock_sendall(connection, request[:start])
    for i in range(start, len(request)):
        await loop.sock_sendall(connection, request[i : i + 1])
        await asyncio.sleep(2 / (len(request) - start))


async def _hang_up_in_body(callers: Callers, connection: socket.socket, request: bytes) -> None:
    start = request.index(b"\r\n\r\n") + 4
    await _send_whole(callers, connection, request[: (start + len(request)) // 2])
    await callers.leave(connection)


async def _hang_up_waiting(callers: Callers, connection: socket.socket, request: bytes) -> None:
    await _send_whole(callers, connection, request)
    await callers.leave(connection)


_SENT: dict[str, _Sender] = {
    "body byte by byte": _send_slowly,
    "hangs up in its body": _hang_up_in_body,
    "hangs up while it waits": _hang_up_waiting,
}


def _request(body: bytes, content_type: str = "application/json", size: int | None = None) -> bytes:
    """A request, whose content-length may be a lie."""
    length = len(body) if size is None else size
    return (
        b"POST /invocations HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (content_type.encode(), length, body)
    )


def _in_chunks(size: int) -> bytes:
    """A request of so many bytes that does not say how long it is."""
    head = _request(b"", size=-1).replace(b"Content-Length: -1", b"Transfer-Encoding: chunked")
    chunk = b" " * 10_000
    part = b"%x\r\n%s\r\n" % (len(chunk), chunk)
    return head + part * (size // len(chunk) + 1) + b"0\r\n\r\n"


_GOOD = b'{"dataframe_records": [{"text": "a"}]}'
_REFUSED: dict[str, tuple[int, Callable[[int], bytes]]] = {
    "malformed JSON": (400, lambda most: _request(_GOOD[:-4])),
    "wrong columns": (400, lambda most: _request(b'{"dataframe_records": [{"a": "b", "c": "d"}]}')),
    "empty body": (400, lambda most: _request(b"")),
    "wrong content type": (415, lambda most: _request(_GOOD, "text/plain")),
    "body over max_body": (413, lambda most: _request(b" " * (most + 1))),
    "body over max_body, in chunks": (413, _in_chunks),
    "content-length over max_body, and little body": (
        413,
        lambda most: _request(_GOOD, size=most + 1),
    ),
    "content-length too short": (400, lambda most: _request(_GOOD, size=len(_GOOD) // 2)),
}

FAULTS = (*_REFUSED, *_SENT)
"""Faults of single requests."""


def answer_commands(
    connection: Connection, port: int, questions: Sequence[Question], max_body: int, seed: int
) -> None:
    """Do what is sent, until this process is ended: a method of ``Callers`` and its arguments.

    What ``at_once`` has sent is told by None before its answer.
    """
    callers = Callers(port, questions, max_body, seed)
    while True:
        name, *arguments = connection.recv()
        if name == "at_once":
            arguments.append(lambda: connection.send(None))
        connection.send(asyncio.run(getattr(callers, name)(*arguments)))
