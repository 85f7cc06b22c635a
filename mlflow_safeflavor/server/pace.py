"""Pace: how fast requests are answered, as far as the last ones tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Pace"]

# Share of the newest answer in the mean: that of about the last twenty counts.
_WEIGHT = 0.05


class Pace:
    """Requests that are there, and the mean time between two answers while any is.

    By Little's law a new request waits for this time, once for each that is there; which holds
    for any number of threads and whatever shares a batch. For one thread, an event loop's.

    Args:
        now: Clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.in_flight = 0
        self._since = 0.0  # the last answer, or when the first request came after a pause
        self._seconds: float | None = None

    def expected(self) -> float:
        """Seconds until a request that came now would be answered; 0 before any was."""
        return (self._seconds or 0.0) * (self.in_flight + 1)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request while the block lasts."""
        if not self.in_flight:
            self._since = self._now()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            now = self._now()
            took, self._since = now - self._since, now
            before = took if self._seconds is None else self._seconds
            self._seconds = before + _WEIGHT * (took - before)
