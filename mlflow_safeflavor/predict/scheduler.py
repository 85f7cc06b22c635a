"""Scheduler: requests of many callers at one model, one or two forwards at a time.

A caller that finds the model free runs its own request; no request waits to be merged. Requests
that come meanwhile are run by threads of the model's own: before each forward, all that wait are
cut into the batches that cost least, and the one of the request whose turn it is is run. A forward
uses every core: a second one beside it fills the gaps before and after, in which the interpreter
belongs to somebody else. No request has both.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow_safeflavor.errors import OverloadedError
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.forwards import run_here, serve
from mlflow_safeflavor.predict.permits import Permits
from mlflow_safeflavor.predict.progress import Progress
from mlflow_safeflavor.predict.state import Observer, State, stop
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.predict.unfailing import unfailing
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput

__all__ = ["Scheduler"]

# Seconds between two looks at how far a request is.
_WATCH = 0.2


class Scheduler:
    """Runs pieces of many callers on one model; safe from many threads, and after a fork.

    Args:
        task: What is asked.
        engine: What runs the model.
        max_batch_tokens: Most tokens of one forward, padding included. A longer single piece runs
            by itself.
        forward_cost: What a forward costs beside its tokens, in tokens; see ``cut_into_batches``.
        deterministic: Run every piece by itself, so that its bits depend on nothing else that is
            asked.
        max_queue: Most requests that may wait; 0 for no limit.
        num_threads: Torch's threads in a forward; 0 for as many as the process's other threads get.
        anywhere: Whether any thread may run a forward. Torch keeps contexts and the number of
            threads for each thread, so that its forwards belong into one that is the model's own.
        abreast: Most forwards at a time; more than 1 only with ``anywhere``.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        *,
        max_batch_tokens: int = 512,
        forward_cost: int = 0,
        deterministic: bool = False,
        max_queue: int = 0,
        num_threads: int = 0,
        anywhere: bool = False,
        abreast: int = 1,
    ) -> None:
        self.max_queue = max_queue
        self.task = task
        budget = task.batch_budget(max_batch_tokens)
        self._state = State(
            task, engine, budget, forward_cost, deterministic, num_threads, anywhere, abreast
        )
        # The state, not the scheduler: a finalizer that held that would keep it for ever.
        weakref.finalize(self, stop, self._state)

    @property
    def permits(self) -> Permits:
        """Taken while rows are encoded or decoded."""
        return self._state.permits

    @property
    def forward_cost(self) -> int:
        """As given, or set since."""
        return self._state.forward_cost

    @forward_cost.setter
    def forward_cost(self, tokens: int) -> None:
        self._state.forward_cost = tokens

    def observe(self, observer: Observer) -> None:
        """Have every forward from now on told to ``observer``; what it raises fails no request."""
        self._state.observer = unfailing(observer, "what observes forwards")

    @contextmanager
    def arriving(self) -> Iterator[object]:
        """Count a request among those that wait for the model, until it is submitted.

        Raises:
            OverloadedError: Too many wait already.
        """
        state = self._state
        with state.arrived:
            there = sum(bool(ticket.waiting) and not ticket.abandoned for ticket in state.tickets)
            there += len(state.arriving)
            if self.max_queue and there >= self.max_queue:
                raise OverloadedError(
                    "More requests wait at the model than it may queue",
                    where="max_queue",
                    wanted=f"at most {self.max_queue}",
                    found=f"{there} are waiting",
                    hint="ask again later, run more workers, or raise max_queue",
                )
            state.arriving.add(arrival := object())
        try:
            yield arrival
        finally:
            with state.arrived:
                state.arriving.discard(arrival)

    def submit(
        self,
        pieces: Sequence[Features],
        params: Mapping[str, Any],
        arrival: object = None,
        *,
        patient: bool = False,
        heard: Callable[[int | None], None] | None = None,
    ) -> Ticket:
        """Queue pieces, at least one; or run them at once, if the model is free and they are few.

        Args:
            pieces: What the model must see.
            params: What ``task.check_params`` returned.
            arrival: Of a request that was ``arriving``.
            patient: Whether the caller may be kept for a whole forward: it has no deadline.
            heard: See ``Ticket``; who listens shares no batch.
        """
        # As texts: params may be lists, which have no hash, and 1, 1.0 and True would be equal.
        key = tuple(repr(params[name]) for name in sorted(self.task.forward_params))
        costs = [self.task.cost(piece) for piece in pieces]
        ticket = Ticket(pieces, costs, params, heard or key, heard)
        state = self._state
        few = len(pieces) == 1 or len(pieces) * max(ticket.costs) <= state.max_batch_tokens
        with state.arrived:
            state.arriving.discard(arrival)  # or it would be counted twice
            ticket.turn = state.spent  # with 0 a new request would come before all that wait
            # Inside its own forward a caller cannot leave when its deadline passes, and a table of
            # several batches would let no other request between.
            free = state.running < state.abreast and not state.tickets
            here = few and patient and state.anywhere and free
            if here:
                state.running += 1
            else:
                state.tickets.append(ticket)
                if not state.threads:  # at the first request that waits, and after a fork
                    _start(state)
                state.arrived.notify()
        if here:
            run_here(state, ticket)
        return ticket

    def run(
        self, ticket: Ticket, deadline: Deadline, tell: Progress | None = None
    ) -> list[RowOutput]:
        """Wait until a ticket is answered. A caller that gives up costs no further forward.

        Args:
            ticket: From ``submit``.
            deadline: Of its request.
            tell: Told the number of pieces answered, and of all.

        Raises:
            DeadlineError: It is too late.
        """
        try:
            looks = tell is not None or deadline.is_watched
            while not ticket.wait(deadline.left(_WATCH if looks else None)):
                if deadline.passed:
                    raise deadline.missed(
                        f"{len(ticket.outputs)} of {len(ticket.pieces)} pieces were answered"
                    )
                if tell is not None:
                    tell(len(ticket.outputs), len(ticket.pieces))
        finally:
            ticket.abandoned = True
        return ticket.result()


def _start(state: State) -> None:
    """Start the model's threads, one for each forward that may run beside others."""
    for _ in range(state.abreast):
        # Daemons: Python joins all others before it runs the finalizer that ends these.
        thread = threading.Thread(target=serve, args=(state,), name="safeflavor-model", daemon=True)
        state.threads.append(thread)
        thread.start()
