"""Forwards of a model, each in the thread of a caller or of the model's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import cast

from mlflow_safeflavor.environment.threads import use_threads
from mlflow_safeflavor.module.failures import is_out_of_memory, named_failure
from mlflow_safeflavor.predict.attended import Attended
from mlflow_safeflavor.predict.request import Request
from mlflow_safeflavor.predict.state import State
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.predict.turns import next_batch
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["run_here", "serve"]


def run_here(state: State, ticket: Ticket) -> None:
    """Run all of a request in the thread of its caller."""
    try:
        while ticket.waiting:
            with state.arrived:
                batch = next_batch(state, [ticket])
            _run_batch(state, batch)
    finally:
        # Also after Ctrl-C: as long as this counts, another request lacks a forward.
        with state.arrived:
            state.running -= 1
            if state.tickets:
                state.arrived.notify()


def serve(state: State) -> None:
    """Run what waits, in a thread of the model's own, until the state is stopped."""
    # Torch has a number of threads for each thread that computes; a session counts its own.
    if not state.anywhere:
        use_threads(state.num_threads)
    batch = list[tuple[Ticket, int]]()
    while batch := _next(state, batch):
        try:
            _run_batch(state, batch)
        # A task's bug must leave no caller waiting for ever, and this thread running: there is no
        # other that takes its place.
        except BaseException as error:
            for ticket, _ in batch:
                ticket.fail(named_failure(error))


def _next(state: State, done: list[tuple[Ticket, int]]) -> list[tuple[Ticket, int]]:
    """The next batch, once there is one and it may run; none once the state is stopped.

    Args:
        state: Of the model.
        done: The batch before, which has been run; emptied, as the next may come much later.
    """
    with state.arrived:
        if done:
            state.running -= 1
        for ticket, _ in done:
            ticket.running = False
        done.clear()
        while not state.stopped:
            state.tickets[:] = [
                ticket for ticket in state.tickets if ticket.waiting and not ticket.abandoned
            ]
            # A table of many batches shall not have all forwards, nor anybody answer it twice.
            idle = [ticket for ticket in state.tickets if not ticket.running]
            if idle and state.running < state.abreast:
                try:
                    batch = next_batch(state, idle)
                except BaseException as error:  # as in ``serve``
                    for ticket in idle:
                        ticket.fail(named_failure(error))
                    continue
                state.running += 1
                for ticket, _ in batch:
                    ticket.running = True
                if len(idle) > 1:
                    state.arrived.notify()  # what is left may go beside this
                return batch
            state.arrived.wait()
    return []


def _run_batch(state: State, batch: Sequence[tuple[Ticket, int]]) -> None:
    """One forward. If it fails, every request alone, so that only those fail that are to blame.

    Where memory ran out, both halves of the batch by themselves, down to a single piece.
    """
    # Abandoned since the batch was cut: while another half or request of it ran.
    batch = [(ticket, i) for ticket, i in batch if not ticket.abandoned]
    if not batch:
        return
    tickets = list(dict.fromkeys(ticket for ticket, _ in batch))
    try:
        engine = cast("Engine", Attended(state.engine, tickets))
        began = time.monotonic()
        outputs = state.task.forward(
            engine, [ticket.pieces[i] for ticket, i in batch], tickets[0].params
        )
        # Before the answers: whoever gets one may read what it cost.
        _count(state, batch, began)
        for (ticket, i), output in zip(batch, outputs, strict=True):
            ticket.give(i, output)
        return
    except BaseException as error:
        if (
            isinstance(error, KeyboardInterrupt)
            and threading.current_thread() is threading.main_thread()
        ):
            raise  # Ctrl-C of the caller whose thread this is, no failure of the model
        if len(batch) > 1 and is_out_of_memory(error):
            parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        elif len(tickets) > 1:
            parts = [[(ticket, i) for ticket, i in batch if ticket is one] for one in tickets]
        else:
            tickets[0].fail(named_failure(error))
            return
    # out of the block above: the error's frames hold the memory of what has failed
    for part in parts:
        _run_batch(state, part)


def _count(state: State, batch: Sequence[tuple[Ticket, int]], began: float) -> None:
    """Tell a forward that has ended to the requests that it was for, and to who observes."""
    seconds = time.monotonic() - began
    costs: dict[Request, list[int]] = {}
    for ticket, i in batch:
        if ticket.request is not None:
            costs.setdefault(ticket.request, []).append(ticket.costs[i])
    for request, own in costs.items():
        request.add(own, began, seconds)
    if state.observer is not None:
        state.observer([ticket.costs[i] for ticket, i in batch], seconds)
