"""Permits: as many callers as there are cores encode or decode at a time, and take turns at it.

More of them would only take the interpreter from the model's thread. Nobody keeps a permit for
longer than a few milliseconds while others wait, so that a request of minutes costs a small one a
turn, not minutes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

from mlflow_safeflavor.predict.deadline import Deadline

__all__ = ["Permits"]

# Seconds that a permit is kept, if what is done can be interrupted that often.
_TURN = 0.01

T = TypeVar("T")


class Permits:
    """A number of permits; who came first is next.

    Args:
        count: Callers at a time.
    """

    def __init__(self, count: int) -> None:
        self._free, self._waiting, self._lock = count, deque[threading.Event](), threading.Lock()

    def in_turns(self, work: Iterable[T | None], deadline: Deadline) -> Iterator[T]:
        """Items of ``work``, made a few milliseconds at a time; in between, others take turns.

        Args:
            work: Does its work while it is iterated; None where it can be interrupted but has
                nothing yet.
            deadline: Of the request.

        Raises:
            DeadlineError: It is too late before its turn comes.
        """
        steps, going = iter(work), True
        while going:
            made: list[T] = []
            self.take(deadline)
            try:
                end, going = time.monotonic() + _TURN, False
                for item in steps:
                    if item is not None:
                        made.append(item)
                    if time.monotonic() >= end:
                        going = True
                        break
            finally:
                self.give()
            yield from made

    def take(self, deadline: Deadline) -> None:
        """Wait for a permit. Raises ``DeadlineError`` where it is too late for one."""
        if deadline.passed:
            raise deadline.missed()
        with self._lock:
            if self._free:  # no caller waits while there is a free one
                self._free -= 1
                return
            self._waiting.append(turn := threading.Event())
        try:
            turn.wait(deadline.left())
        except BaseException:
            # Ctrl-C may come when the permit was just handed over: kept, it would be lost for good.
            if not self._withdrawn(turn):
                self.give()
            raise
        if self._withdrawn(turn):
            raise deadline.missed()

    def _withdrawn(self, turn: threading.Event) -> bool:
        """Whether a caller waits no longer; False where its permit was handed over already."""
        with self._lock:
            if turn.is_set():
                return False
            self._waiting.remove(turn)
            return True

    def give(self) -> None:
        """Give a permit back."""
        with self._lock:
            if self._waiting:
                # Handed over, not freed: a caller that asks in this moment would be served first.
                self._waiting.popleft().set()
            else:
                self._free += 1
