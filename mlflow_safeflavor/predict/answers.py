"""Answers: from rows to one answer each, for one caller of a model that others use, too."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.progress import Progress
from mlflow_safeflavor.predict.request import current_request
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["answer_rows", "predict_rows"]

# Bytes of features and outputs in one part of a request, about; two parts are held at a time.
_HELD = 16_000_000


def predict_rows(
    task: Task,
    scheduler: Scheduler,
    rows: Sequence[Row],
    params: Mapping[str, Any] | None = None,
    *,
    timeout: float | None = None,
    tell: Progress | None = None,
) -> tuple[list[dict[str, Any]], list[RowOutput]]:
    """Answers and raw outputs, one of each for each row, in order; see ``answer_rows``.

    Args:
        task: What is asked.
        scheduler: What runs the model.
        rows: Rows by field.
        params: Per-request params.
        timeout: Seconds; None or 0 for as long as it takes.
        tell: See ``answer_rows``.
    """
    found = list(answer_rows(task, scheduler, rows, params, Deadline(timeout), tell))
    return [answer for answer, _ in found], [output for _, output in found]


def answer_rows(
    task: Task,
    scheduler: Scheduler,
    rows: Sequence[Row],
    params: Mapping[str, Any] | None,
    deadline: Deadline,
    tell: Progress | None = None,
) -> Iterator[tuple[dict[str, Any], RowOutput]]:
    """Answer and raw output of each row, in order. Safe from many threads.

    Long tables go through in parts: while the model runs one, the next is encoded, and no more are
    held.

    Args:
        task: What is asked.
        scheduler: What runs the model.
        rows: Rows by field, as ``task.rows`` makes them; at least one.
        params: Per-request params; missing ones take their defaults.
        deadline: Of the request.
        tell: Called now and then with the number of rows that are answered, and of all.

    Raises:
        InputError: A row or param cannot be answered, or asks for more than a cap allows; names it.
        OverloadedError: Too many requests wait already.
        DeadlineError: It is too late.
    """
    # Before anything else reads a text: a cap bounds work only where it comes before the work.
    task.require_clean(rows, params)
    if (request := current_request.get()) is not None:
        request.ask(len(rows))
    checked = task.check_params(params)
    parts = _parts(task, scheduler.permits.in_turns(task.encode(rows, checked), deadline))
    waiting = deque[tuple[list[Features], Ticket]]()
    done = 0
    try:
        # Counted while its first part is encoded: otherwise any number of requests could encode.
        with scheduler.arriving() as arrival:
            waiting.append(_submitted(scheduler, next(parts), checked, deadline, arrival))
        while waiting:
            # Queued before this caller waits, so that the model goes on with it without a gap.
            if part := next(parts, None):
                waiting.append(_submitted(scheduler, part, checked, deadline))
            features, ticket = waiting[0]
            outputs = _joined(
                task,
                features,
                scheduler.run(ticket, deadline, _of_all(tell, done, features, rows)),
            )
            asked = rows[done : done + len(features)]
            answers = task.decode(asked, features, outputs, checked, first=done)
            yield from zip(scheduler.permits.in_turns(answers, deadline), outputs, strict=True)
            done += len(features)
            waiting.popleft()
    finally:
        # A deadline, an error or a caller that stops iterating leaves no work in the queue.
        for _, ticket in waiting:
            ticket.abandoned = True


def _parts(task: Task, features: Iterator[Features]) -> Iterator[list[Features]]:
    """Features of rows in order, as many at a time as may be held, at least one."""
    part: list[Features] = []
    held = 0
    for row in features:
        part.append(row)
        held += task.holds(row)
        if held >= _HELD:
            yield part
            part, held = [], 0
    if part:
        yield part


def _submitted(
    scheduler: Scheduler,
    features: list[Features],
    params: Mapping[str, Any],
    deadline: Deadline,
    arrival: object = None,
) -> tuple[list[Features], Ticket]:
    pieces = [piece for row in features for piece in scheduler.task.pieces(row)]
    return features, scheduler.submit(pieces, params, arrival, patient=deadline.left() is None)


def _joined(
    task: Task, features: Sequence[Features], outputs: Sequence[RowOutput]
) -> list[RowOutput]:
    """The outputs of pieces as those of rows."""
    found = iter(outputs)
    return [task.join([next(found) for _ in task.pieces(row)]) for row in features]


def _of_all(
    tell: Progress | None, before: int, part: Sequence[Features], rows: Sequence[Row]
) -> Progress | None:
    """Told of pieces of one part, it tells of rows of the whole request."""
    if tell is None:
        return None
    return lambda done, pieces: tell(before + len(part) * done // (pieces or 1), len(rows))
