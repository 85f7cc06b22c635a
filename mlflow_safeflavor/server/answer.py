"""The answer to one request, as it passes the gate on its way out."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from mlflow_safeflavor.predict.request import Request

__all__ = ["Answer", "Message", "Receive", "Send"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_START, _BODY = "http.response.start", "http.response.body"

_logger = logging.getLogger("mlflow.safeflavor")


class Answer:
    """``send`` of ASGI: adds the request's name, and keeps traces of the server from the client.

    Args:
        request: What is answered.
        send: Of the server.

    Attributes:
        status: Of the answer; 500 before there is any.
        complete: Whether all of it was sent.
    """

    def __init__(self, request: Request, send: Send) -> None:
        self.request, self.status, self.complete = request, 500, False
        self._send = send
        # Start of an error, until its body is there: it may have to change.
        self._error: Message | None = None
        self._body = b""

    async def of(self, app: Awaitable[None]) -> None:
        """Wait for an app that answers; what it cannot parse is the request's fault."""
        try:
            await app
        except Exception as error:
            # MLflow lets exceptions of pandas through before the model is asked, and only then:
            # those of a model are answered as errors.
            if self.complete or self.request.rows:
                raise
            _logger.exception("safeflavor: request %s cannot be read", self.request.name)
            self._error = None
            await self.refuse(400, f"The request cannot be read: {type(error).__name__}: {error}")
        if self._error is not None:
            await self._finish(self._error, self._body)

    async def __call__(self, message: Message) -> None:
        if message["type"] == _START:
            self.status = message["status"]
            if self.status >= 400:
                self._error = message
                return
            message = self._named(message)
        elif self._error is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            # Where the app fails, this answer is sent first and the exception raised after it.
            if self.status == 500 and not self.request.rows and not _is_json(self._body):
                return
            error, self._error = self._error, None
            await self._finish(error, _without_trace(self._body))
            return
        elif not message.get("more_body", False):
            self.complete = True  # from here on the server says "disconnect" to whoever listens
        await self._send(message)

    async def refuse(
        self,
        status: int,
        why: str,
        retry_after: int | None = None,
        *,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Answer in the words of MLflow's errors, without the app.

        Args:
            status: Of HTTP.
            why: For the client.
            retry_after: Seconds.
            then: Run when all of it was sent, before the connection may end.
        """
        self.status = status
        code = "TEMPORARILY_UNAVAILABLE" if status == 503 else "INVALID_PARAMETER_VALUE"
        headers = [(b"content-type", b"application/json")]
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        if status in (408, 413):  # the rest of its body is not wanted
            headers.append((b"connection", b"close"))
        content = json.dumps({"error_code": code, "message": why}).encode()
        await self._finish({"type": _START, "status": status, "headers": headers}, content, then)

    async def _finish(
        self, start: Message, body: bytes, then: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        if start["status"] == 503 and not any(name == b"retry-after" for name, _ in headers):
            headers.append((b"retry-after", b"1"))
        self.complete = True
        await self._send(self._named({**start, "headers": headers}))
        if then is not None:
            await self._send({"type": _BODY, "body": body, "more_body": True})
            await then()
            body = b""
        await self._send({"type": _BODY, "body": body})

    def _named(self, start: Message) -> Message:
        headers = [*start.get("headers", ()), (b"x-request-id", self.request.name.encode())]
        return {**start, "headers": headers}


def _without_trace(body: bytes) -> bytes:
    """An error of MLflow's without ``stack_trace``, which goes to the log instead."""
    if b"stack_trace" not in body:
        return body
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, Mapping) or "stack_trace" not in content:
        return body
    _logger.error("safeflavor: a request was answered with an error\n%s", content["stack_trace"])
    kept = {name: value for name, value in content.items() if name != "stack_trace"}
    return json.dumps(kept).encode()


def _is_json(body: bytes) -> bool:
    return body[:1] == b"{"
