"""Forwards of a model, one at a time."""

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
            _run_batch(state, next_batch(state, [ticket]))
    finally:
        # Also after Ctrl-C: while ``running`` is set, no other request gets a forward.
        with state.arrived:
            state.running = False
            if state.tickets:
                state.arrived.notify()


def serve(state: State) -> None:
    """Run all that waits, in the model's own thread, until the state is stopped."""
    # Torch has a number of threads for each thread that computes; a session counts its own.
    if not state.anywhere:
        use_threads(state.num_threads)
    while True:
        with state.arrived:
            state.tickets[:] = [
                ticket for ticket in state.tickets if ticket.waiting and not ticket.abandoned
            ]
            while (state.running or not state.tickets) and not state.stopped:
                state.arrived.wait()
            if state.stopped:
                return
            state.running = True
            tickets = list(state.tickets)
        try:
            _run_batch(state, next_batch(state, tickets))
        # A task's bug must leave no caller waiting for ever, and this thread running: it is the
        # only one.
        except BaseException as error:
            for ticket in tickets:
                ticket.fail(named_failure(error))
        # Without the lock: the tickets that were run are still listed, so no caller runs its own.
        state.running = False
        tickets.clear()  # until the next request, which may come much later


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
