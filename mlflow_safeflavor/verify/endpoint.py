"""A running MLflow scoring server: requests to it, and its answers."""

from __future__ import annotations

import io
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import pandas as pd
import requests
from mlflow.utils.proto_json_utils import NumpyEncoder

from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.errors import InputError, SafeFlavorError

__all__ = ["Endpoint", "as_served", "request_of_arrays", "request_of_rows"]

_PATH = "/invocations"
_SHOWN = 400  # characters of a server's words in a message
_MAX_ANSWER = 256 * 10**6  # bytes
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, and the time that it has.

    Args:
        url: Address of the server, with or without ``/invocations``; a user and password in it are
            sent, never shown.
        timeout: Seconds that all its requests may take together.

    Raises:
        InputError: The address is none of a web server.
    """

    url: str
    timeout: float = 60.0
    _spent: list[float] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, brackets that do not close
            usable = False
        if not usable:
            raise InputError(
                "Not the address of a server",
                where="endpoint",
                wanted="http://HOST:PORT",
                found=repr(self.url),
            )

    def __str__(self) -> str:
        # Without user and password: this is printed, logged and written into pages.
        parts = urlsplit(self._address)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def _address(self) -> str:
        address = self.url.rstrip("/")
        return address if address.endswith(_PATH) else address + _PATH

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The predictions to one request, as JSON.

        Args:
            request: Body of the request.

        Raises:
            SafeFlavorError: The server is not reachable, is no MLflow scoring server, or refuses
                the request.
        """
        started = time.monotonic()
        try:
            status, kind, body = _in_time(
                lambda: self._post(request), self.timeout - sum(self._spent)
            )
        except (requests.RequestException, OSError, UnicodeError) as error:
            raise SafeFlavorError(
                "The server cannot be reached",
                where=str(self),
                wanted=f"all answers within {self.timeout:g} s",
                found=_reason(error),
                hint="start it with `mlflow models serve`, and look at its log; or give it more "
                "time",
            ) from None
        finally:
            self._spent.append(time.monotonic() - started)
        return self._predictions(status, kind, body)

    def _post(self, request: Mapping[str, Any]) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer."""
        # Redirects would turn the question into a GET of something else.
        with requests.post(
            self._address,
            data=json.dumps(request).encode(),
            headers={"Content-Type": "application/json"},
            timeout=self.timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            body = bytearray()
            # In pieces: a server may send without end.
            for part in response.iter_content(1 << 16):
                body += part
                if len(body) > _MAX_ANSWER:
                    raise requests.RequestException(f"an answer of more than {_MAX_ANSWER} bytes")
            return (
                response.status_code,
                response.headers.get("Content-Type", "no content type"),
                bytes(body),
            )

    def _predictions(self, status: int, kind: str, body: bytes) -> Any:
        try:
            content = parse_json(body, strict=False)
        except ValueError:
            content = None
        if status == 200 and isinstance(content, dict) and "predictions" in content:
            return content["predictions"]
        if isinstance(content, dict) and {"error_code", "message"} <= content.keys():
            raise SafeFlavorError(
                "The server refuses the request",
                where=str(self),
                wanted="predictions",
                found=f"status {status}, {_shown(_cause(str(content['message'])))}",
                hint="see that it serves this very model, and look at its log",
            )
        raise SafeFlavorError(
            "This is not an MLflow scoring server",
            where=str(self),
            wanted='status 200 and JSON with "predictions"',
            found=f"status {status}, {_shown(kind)}: {_shown(body.decode(errors='replace'))}",
            hint="give the address that `mlflow models serve` or the container listens on",
        )


def _in_time(ask: Callable[[], _Answer], seconds: float) -> _Answer:
    """The result or error of ``ask``, or ``requests.Timeout`` after so many seconds."""
    # In a thread that is left to itself then: a server that sends a byte now and then keeps every
    # timeout of a socket from ending.
    done: queue.SimpleQueue[tuple[_Answer | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((ask(), None))
        except BaseException as error:  # raised again by the thread that waits
            done.put((None, error))

    threading.Thread(target=run, name="safeflavor-endpoint", daemon=True).start()
    try:
        answer, error = done.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise requests.Timeout from None
    if error is not None:
        raise error
    return cast("_Answer", answer)


def _reason(error: BaseException) -> str:
    """The innermost cause: libraries wrap it, and name the address with each layer."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _cause(message: str) -> str:
    """The end of MLflow's message, which repeats all rows before it names what is wrong."""
    return message.rpartition("\nError: ")[2]


def _shown(text: str) -> str:
    """A stranger's text, cut short and without signs that a terminal obeys."""
    shown = ascii(text[:_SHOWN])
    return shown if len(text) <= _SHOWN else f"{shown} …"


def request_of_rows(frame: pd.DataFrame) -> dict[str, Any]:
    """Rows as MLflow's server takes them, without their index; plain JSON."""
    split = frame.to_dict(orient="split")
    return _plain({"dataframe_split": {"columns": split["columns"], "data": split["data"]}})


def request_of_arrays(arrays: Any) -> dict[str, Any]:
    """Arrays or nested lists, named or a single one, as MLflow's server takes them; plain JSON."""
    return _plain({"inputs": dict(arrays) if isinstance(arrays, Mapping) else arrays})


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    # MLflow's encoder turns numpy's numbers, dates and bytes into JSON as its server expects them.
    try:
        plain: dict[str, Any] = json.loads(json.dumps(request, cls=NumpyEncoder))
    except (TypeError, ValueError) as error:
        raise InputError("The rows cannot be sent as JSON", found=error) from None
    return plain


def as_served(result: Any) -> Any:
    """The answer that a server would send if ``predict`` returned this."""
    # Through MLflow's own writer and back, as on the server: so nothing but the model's numbers can
    # differ. A double survives JSON unchanged.
    from mlflow.pyfunc.scoring_server import predictions_to_json  # takes a second to import

    text = io.StringIO()
    predictions_to_json(result, text)  # type: ignore[no-untyped-call]  # MLflow's
    return json.loads(text.getvalue())["predictions"]
