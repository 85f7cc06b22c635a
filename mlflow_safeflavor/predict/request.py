"""The request of a server that a prediction is for, and what its forwards cost."""

from __future__ import annotations

import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["Request", "current_request"]


@dataclass(eq=False)
class Request:
    """One request, from its arrival to its answer.

    Attributes:
        name: Its id, as the client gave it or made here.
        traceparent: The span that it is part of, as W3C Trace Context writes it; "" for none.
        until: When whoever passes on the answer stops waiting, by ``time.monotonic``; None for
            never.
        arrived: When it was there, by ``time.monotonic``.
        gone: Whether the client has hung up.
        rows: Rows that were asked.
        pieces: Pieces that forwards were run for; a row has one or more.
        tokens: Cost of these pieces in tokens, without padding.
        forwards: Forwards that it had a part in.
        forward_seconds: Time of these, shared with others or not.
        began: When the first of them began; None before.
    """

    name: str = ""
    traceparent: str = ""
    until: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False
    rows: int = 0
    pieces: int = 0
    tokens: int = 0
    forwards: int = 0
    forward_seconds: float = 0.0
    began: float | None = None
    # Of an iterator, two threads answer a chunk each.
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.gone or (self.until is not None and time.monotonic() >= self.until)

    @property
    def queued_seconds(self) -> float:
        """Time from its arrival to its first forward; until now where there was none."""
        return (time.monotonic() if self.began is None else self.began) - self.arrived

    def ask(self, rows: int) -> None:
        """Count rows that are asked."""
        with self._lock:
            self.rows += rows

    def add(self, costs: list[int], began: float, seconds: float) -> None:
        """Count a forward.

        Args:
            costs: Of each of its pieces that was in it, in tokens.
            began: When it began.
            seconds: Time that it took.
        """
        with self._lock:
            if self.began is None:
                self.began = began
            self.pieces += len(costs)
            self.tokens += sum(costs)
            self.forwards += 1
            self.forward_seconds += seconds


# A variable of the context: threads that asyncio and MLflow start for a request inherit it, while
# arguments would have to pass through MLflow's server.
current_request: ContextVar[Request | None] = ContextVar("safeflavor_request", default=None)
