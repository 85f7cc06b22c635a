"""An engine, for as long as somebody waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["Attended"]


class Attended:
    """An engine that stops writing once nobody waits for the text any more.

    Args:
        engine: What runs the model.
        tickets: For whom.
    """

    def __init__(self, engine: Engine, tickets: Sequence[Ticket]) -> None:
        self._engine, self._tickets = engine, tickets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One forward, as the engine does it."""
        return self._engine(inputs)

    def generate(
        self,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        stopping: Sequence[Callable[..., Any]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Let the model write, as the engine does it, as long as somebody waits."""
        return self._engine.generate(inputs, settings, stopping=[*stopping, self._go_on], **options)

    def _go_on(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done: none of them, shape (rows,)."""
        if all(ticket.abandoned for ticket in self._tickets):
            raise TimeoutError("nobody waits for this text any more")
        return ids[:, 0] < 0
