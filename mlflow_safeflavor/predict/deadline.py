"""Deadline: when a request is too late, from its arrival through everything done for it."""

from __future__ import annotations

import time

from mlflow_safeflavor.errors import DeadlineError
from mlflow_safeflavor.predict.request import current_request

__all__ = ["Deadline"]


class Deadline:
    """A number of seconds from now on, at the longest until nobody waits for the request any more.

    Args:
        seconds: None or 0 for as long as it takes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        # Monotonic: setting the machine's clock must not end requests, or let them wait for hours.
        self._until = time.monotonic() + seconds if seconds else None
        self._request = current_request.get()

    @property
    def is_watched(self) -> bool:
        """Whether it may pass at any moment, as the client may hang up."""
        return self._request is not None

    def left(self, most: float | None = None) -> float | None:
        """Seconds left, 0 where it is too late, but no more than ``most``.

        None for as long as it takes.
        """
        if self._until is None:
            return most
        seconds = max(0.0, self._until - time.monotonic())
        return seconds if most is None else min(seconds, most)

    @property
    def passed(self) -> bool:
        """Whether it is too late."""
        return self.left() == 0 or (self._request is not None and self._request.over)

    def missed(self, found: str = "nothing was answered") -> DeadlineError:
        """The error of a request that is too late.

        Args:
            found: How far the request was.
        """
        if self._request is not None and self._request.over:
            return DeadlineError(
                "Nobody waits for the answer any more",
                where=f"request {self._request.name}",
                wanted="a client that is still there, within the server's own time",
                found=found,
                hint="send fewer rows at once, run more workers, or raise "
                "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT",
            )
        return DeadlineError(
            "The model did not answer in time",
            where="timeout",
            wanted=f"within {self.seconds:g} seconds of the request",
            found=found,
            hint="send fewer rows at once, run more workers, or raise timeout",
        )
