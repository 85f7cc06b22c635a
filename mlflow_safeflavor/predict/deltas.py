"""Deltas: the answer to one row while it is written."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from mlflow_safeflavor.errors import InputError, SafeFlavorError
from mlflow_safeflavor.module.failures import named_failure
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.request import current_request
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.features import RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["stream_row"]


def stream_row(
    task: Task, scheduler: Scheduler, data: Any, params: Mapping[str, Any] | None, timeout: float
) -> Iterator[Any]:
    """Parts of the answer to a row. What cannot be answered is refused before the first is asked.

    Args:
        task: What is asked.
        scheduler: What runs the model. The row runs by itself.
        data: One row.
        params: Per-request params.
        timeout: Seconds from the first part asked for to the last one; 0 for as long as it takes.

    Raises:
        InputError: The task answers in one piece, there is another number of rows, or a row or
            param cannot be answered; names it.
        OverloadedError: Too many requests wait already.
        DeadlineError: It is too late.
    """
    if not task.streams:
        raise InputError(
            "The task answers in one piece",
            where=f"task {task.name!r}",
            wanted="a task that writes text",
            hint="call predict",
        )
    params = task.asked_in(data, params)
    rows = task.rows(data)
    if len(rows) != 1:
        raise InputError(
            "A stream is the answer to one row",
            where="rows",
            wanted="one row",
            found=f"{len(rows)} rows",
            hint="call predict_stream for each, or predict",
        )
    task.require_clean(rows, params)
    return _parts(task, scheduler, rows[0], task.check_streamed(params), timeout)


def _parts(
    task: Task, scheduler: Scheduler, row: Row, params: Mapping[str, Any], timeout: float
) -> Iterator[Any]:
    deadline = Deadline(timeout)
    if (request := current_request.get()) is not None:
        request.ask(1)
    with scheduler.arriving() as arrival:
        (features,) = scheduler.permits.in_turns(task.encode([row], params), deadline)
        heard: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        pieces = task.pieces(features)
        ticket = scheduler.submit(pieces, params, arrival, heard=heard.put)

    def output() -> RowOutput:
        return task.join(scheduler.run(ticket, deadline))

    try:
        yield from task.streamed(row, params, iter(partial(_next, heard, deadline), None), output)
    except (SafeFlavorError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics with what is no Exception
        raise named_failure(error, "decoding") from error
    finally:
        # A caller that stops iterating leaves no text to be written to its end.
        ticket.abandoned = True


def _next(heard: queue.SimpleQueue[int | None], deadline: Deadline) -> int | None:
    """The next token; None when there is none left."""
    try:
        return heard.get(timeout=deadline.left())
    except queue.Empty:
        raise deadline.missed("the text was not finished") from None
