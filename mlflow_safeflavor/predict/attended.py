"""An engine whose generation is heard, and ends once every caller has gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow_safeflavor.module.generation import Generation
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["Attended"]


class Attended:
    """An engine that tells who listens each token, and stops once all tickets are abandoned.

    Args:
        engine: Runs the model.
        tickets: Requests that share the batch.
    """

    def __init__(self, engine: Engine, tickets: Sequence[Ticket]) -> None:
        self._engine, self._tickets = engine, tickets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One forward, as the engine does it."""
        return self._engine(inputs)

    def generate(self, inputs: Mapping[str, Any], generation: Generation) -> dict[str, Any]:
        """Generate, as the engine does it, until the end or until all tickets are abandoned."""
        stopping = [*generation.stopping, self._go_on]
        return self._engine.generate(inputs, replace(generation, stopping=stopping))

    def _go_on(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Stopping criterion of transformers: which rows are done, bool of shape (rows,)."""
        # Asked after each token: a text of minutes ends at its next token, not at its last.
        if all(ticket.abandoned for ticket in self._tickets):
            raise TimeoutError("nobody waits for this text any more")
        # Of several rows or pieces, beams or draws of one prompt, none is the text.
        first = self._tickets[0]
        if first.heard is not None and len(ids) == len(first.pieces) == 1:
            first.heard(int(ids[0, -1]))
        return ids[:, 0] < 0  # no token id is negative: no row is done
