"""Rows → batches → rows: encode all, run rows of near length together, answer in the order asked."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_safeflavor.engine import Engine
from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.base import Row, RowOutput, Task

__all__ = ["DEFAULT_MAX_BATCH_TOKENS", "cut_into_batches", "predict_rows"]

# Measured on a CPU with a 22 M parameter encoder and 256 texts of mixed length: sorted by length, 512 tokens a
# batch ran 1.5 to 1.8 times faster than row by row. Larger batches only grow activations out of the caches.
DEFAULT_MAX_BATCH_TOKENS = 512


def predict_rows(
    task: Task,
    engine: Engine,
    rows: Sequence[Row],
    params: Mapping[str, Any] | None = None,
    *,
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
) -> tuple[list[dict[str, Any]], list[RowOutput]]:
    """Answers and raw outputs, one of each for each row, in order. Safe from many threads.

    Args:
        task: What is asked.
        engine: What runs the model.
        rows: Rows by field, as ``rows_of`` makes them.
        params: Per-request params; missing ones take their defaults.
        max_batch_tokens: Most tokens of one forward, padding included. A longer single row runs by itself.

    Raises:
        InputError: A row or param cannot be answered; names it.
    """
    checked = task.check_params(params)
    features = task.encode(rows, checked)
    pieces = [list(task.pieces(row)) for row in features]
    flat = [piece for row in pieces for piece in row]
    found: dict[int, RowOutput] = {}
    for batch in cut_into_batches([task.cost(piece) for piece in flat], task.batch_budget(max_batch_tokens)):
        found.update(zip(batch, task.forward(engine, [flat[i] for i in batch], checked), strict=True))
    in_order = (found[i] for i in range(len(flat)))
    outputs = [task.join([next(in_order) for _ in row]) for row in pieces]
    return task.decode(rows, features, outputs, checked), outputs


def cut_into_batches(costs: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices of ``costs`` in batches of near cost, each at most ``max_batch_tokens`` when padded to its longest.

    The most expensive come first, so that a batch's padded length is known when it is opened, and what
    does not fit into memory fails at once and not after minutes.

    Raises:
        InputError: ``max_batch_tokens`` is no positive whole number.
    """
    budget = _positive(max_batch_tokens)
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if room < 1:
            batches.append([])
            room = max(1, budget // max(1, costs[i]))
        batches[-1].append(i)
        room -= 1
    return batches


def _positive(max_batch_tokens: Any) -> int:
    try:
        value = 0 if isinstance(max_batch_tokens, bool) else operator.index(max_batch_tokens)
    except TypeError:
        value = 0
    if value < 1:
        raise InputError(
            "max_batch_tokens is out of range",
            where="max_batch_tokens",
            wanted="a whole number of at least 1",
            found=repr(max_batch_tokens),
        )
    return value
