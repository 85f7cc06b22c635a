"""Tickets: requests, or parts of them, at the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.predict.request import current_request
from mlflow_safeflavor.tasks.features import Features, RowOutput

__all__ = ["Ticket"]


class Ticket:
    """Pieces of one request at the model, answered in any order, and dropped once abandoned.

    Args:
        pieces: Features, one forward's worth for each.
        costs: Of each piece.
        params: What ``task.check_params`` returned.
        key: The params that ``forward`` looks at; only tickets of the same key share a batch.
        heard: Told each token of a text as it is written, and None when the ticket is answered or
            has failed.
    """

    def __init__(
        self,
        pieces: Sequence[Features],
        costs: Sequence[int],
        params: Mapping[str, Any],
        key: object,
        heard: Callable[[int | None], None] | None = None,
    ) -> None:
        self.pieces, self.costs, self.params, self.key = pieces, costs, params, key
        self.heard = heard
        self.request = current_request.get()  # of the caller: forwards are in another thread
        # Longest first: neighbours in length share a batch with the least padding.
        self.waiting = deque(sorted(range(len(pieces)), key=lambda i: -costs[i]))
        self.turn = 0
        self.served = False
        self.running = False  # some of its pieces are in a forward
        self.outputs: dict[int, RowOutput] = {}
        self.error: BaseException | None = None
        self.abandoned = False
        self.over = False
        # Held until then. An event is a condition, in Python that each request would run.
        self._pending = threading.Lock()
        self._pending.acquire()

    def wait(self, seconds: float | None) -> bool:
        """Whether it is answered, or has failed, within so many seconds."""
        if not self.over and self._pending.acquire(timeout=-1 if seconds is None else seconds):
            self._pending.release()  # for who asks again
        return self.over

    def result(self) -> list[RowOutput]:
        """One output a piece, in order. Raises what the model raised."""
        if self.error is not None:
            raise self.error
        return [self.outputs[i] for i in range(len(self.pieces))]

    def take(self, tokens: int) -> list[int]:
        """The next pieces, as many as ``tokens`` hold but at least one."""
        taken: list[int] = []
        while self.waiting and (tokens > 0 or not taken):
            taken.append(self.waiting.popleft())
            tokens -= self.costs[taken[-1]]
        return taken

    def give(self, i: int, output: RowOutput) -> None:
        """Answer piece ``i``."""
        self.outputs[i] = output
        if len(self.outputs) == len(self.pieces):
            self._end()

    def fail(self, error: BaseException) -> None:
        """Answer all pieces with an exception."""
        # Before the event: the caller reads the error as soon as it wakes.
        self.error, self.abandoned = error, True
        self._end()

    def _end(self) -> None:
        if not self.over:
            self.over = True
            self._pending.release()
        if self.heard is not None:
            self.heard(None)
