"""All callers of a model: whoever finds it free runs his own request, and whatever waits meanwhile is run together.

Nobody is made to wait for company. What has to wait is run by a thread of the model's own: before each forward,
everything that waits is cut into the batches that cost least, and the one of the request whose turn it is is run.
One forward at a time, because it uses every core already: two would only take them from each other.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from mlflow_safeflavor.environment.threads import use_threads
from mlflow_safeflavor.errors import OverloadedError
from mlflow_safeflavor.machine import available_cpus
from mlflow_safeflavor.module.failures import is_out_of_memory, named_failure
from mlflow_safeflavor.predict.batching import cut_into_batches
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.places import Places
from mlflow_safeflavor.predict.progress import Watch
from mlflow_safeflavor.tasks.base import Features, RowOutput, Task
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["Scheduler", "Ticket"]

_AHEAD = 4
"""Full batches' worth of a request's pieces that are looked at before each forward. A request's pieces come in order
of length, so that more would change nothing but the time it takes."""

_WATCH = 0.2
"""Seconds between two looks at how far a request is."""


class Ticket:
    """A request at the model. Its pieces are answered in any order, and forgotten once nobody waits for them.

    Args:
        pieces: What the model must see.
        costs: Of each piece.
        params: What ``task.check_params`` returned.
        key: The params that ``forward`` looks at; only tickets of the same key share a batch.
    """

    def __init__(
        self, pieces: Sequence[Features], costs: Sequence[int], params: Mapping[str, Any], key: object
    ) -> None:
        self.pieces, self.costs, self.params, self.key = pieces, costs, params, key
        self.waiting = deque(sorted(range(len(pieces)), key=lambda i: -costs[i]))
        self.turn = 0
        self.served = False
        self.outputs: dict[int, RowOutput] = {}
        self.error: BaseException | None = None
        self.abandoned = False
        self._over = threading.Event()

    def wait(self, seconds: float | None) -> bool:
        """Whether it is answered, or has failed, within so many seconds."""
        return self._over.wait(seconds)

    def result(self) -> list[RowOutput]:
        """One output a piece, in order. Raises what the model raised."""
        if self.error is not None:
            raise self.error
        return [self.outputs[i] for i in range(len(self.pieces))]

    def take(self, tokens: int) -> list[int]:
        """The next pieces, as many as ``tokens`` hold but at least one."""
        taken: list[int] = []
        while self.waiting and (tokens > 0 or not taken):
            taken.append(self.waiting.popleft())
            tokens -= self.costs[taken[-1]]
        return taken

    def give(self, i: int, output: RowOutput) -> None:
        """Answer piece ``i``."""
        self.outputs[i] = output
        if len(self.outputs) == len(self.pieces):
            self._over.set()

    def fail(self, error: BaseException) -> None:
        """Answer everything else with an exception."""
        self.error, self.abandoned = error, True
        self._over.set()


@dataclass(eq=False)
class _State:
    """What the model's thread holds. Not the scheduler: else neither that nor the model could ever be freed.

    Whoever sets ``running`` runs forwards, and alone looks at what waits; the others only add to it.
    """

    task: Task
    engine: Engine
    max_batch_tokens: int
    forward_cost: int
    deterministic: bool
    num_threads: int
    anywhere: bool
    places: Places = field(default_factory=lambda: Places(available_cpus()))
    arrived: threading.Condition = field(default_factory=threading.Condition)
    arriving: set[object] = field(default_factory=set)
    tickets: list[Ticket] = field(default_factory=list)
    spent: int = 0  # tokens that all forwards so far have cost
    went_on: bool = False  # whether the last one was for a request that had been served before
    running: bool = False
    stopped: bool = False
    thread: threading.Thread | None = None


class Scheduler:
    """Runs pieces of many callers on one model; safe from many threads, and after a fork.

    Args:
        task: What is asked.
        engine: What runs the model.
        max_batch_tokens: Most tokens of one forward, padding included. A longer single piece runs by itself.
        forward_cost: What a forward costs beside its tokens, in tokens; see ``cut_into_batches``.
        deterministic: Run every piece by itself, so that its bits depend on nothing else that is asked.
        max_queue: Most requests that may wait; 0 for no limit.
        num_threads: Torch's threads in a forward; 0 for as many as the process's other threads get.
        anywhere: Whether any thread may run a forward. Torch keeps contexts and the number of threads for each thread,
            so that its forwards belong into one that nobody else has touched.
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
    ) -> None:
        self.max_queue = max_queue
        self.task = task
        budget = task.batch_budget(max_batch_tokens)
        self._state = _State(task, engine, budget, forward_cost, deterministic, num_threads, anywhere)
        _STATES.add(self._state)
        weakref.finalize(self, _stop, self._state)

    @property
    def places(self) -> Places:
        """Taken while rows are encoded or decoded."""
        return self._state.places

    @property
    def forward_cost(self) -> int:
        """As given, or set since."""
        return self._state.forward_cost

    @forward_cost.setter
    def forward_cost(self, tokens: int) -> None:
        self._state.forward_cost = tokens

    @contextmanager
    def arriving(self) -> Iterator[object]:
        """A request that is not at the model yet, but is counted among those that wait for it until it is submitted.

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
                    way_out="ask again later, run more workers, or raise max_queue",
                )
            state.arriving.add(arrival := object())
        try:
            yield arrival
        finally:
            with state.arrived:
                state.arriving.discard(arrival)

    def submit(
        self, pieces: Sequence[Features], params: Mapping[str, Any], arrival: object = None, *, patient: bool = False
    ) -> Ticket:
        """Queue pieces, at least one; or run them here and now, where the model is free and they are few.

        Args:
            pieces: What the model must see.
            params: What ``task.check_params`` returned.
            arrival: Of a request that was ``arriving``.
            patient: Whether the caller may be kept for a whole forward: it has no deadline.
        """
        key = tuple(repr(params[name]) for name in sorted(self.task.forward_params))
        ticket = Ticket(pieces, [self.task.cost(piece) for piece in pieces], params, key)
        state = self._state
        few = len(pieces) == 1 or len(pieces) * max(ticket.costs) <= state.max_batch_tokens
        with state.arrived:
            state.arriving.discard(arrival)  # or it would be counted twice
            ticket.turn = state.spent
            here = few and patient and state.anywhere and not state.running and not state.tickets
            if here:
                state.running = True
            else:
                state.tickets.append(ticket)
                if state.thread is None:
                    state.thread = threading.Thread(target=_serve, args=(state,), name="safeflavor-model", daemon=True)
                    state.thread.start()
                state.arrived.notify()
        if here:
            _run_here(state, ticket)
        return ticket

    def run(self, ticket: Ticket, deadline: Deadline, watch: Watch | None = None) -> list[RowOutput]:
        """Wait until a ticket is answered. A caller that gives up costs no further forward.

        Args:
            ticket: From ``submit``.
            deadline: Of its request.
            watch: Told the number of pieces answered, and of all.

        Raises:
            DeadlineError: It is too late.
        """
        try:
            while not ticket.wait(deadline.left(None if watch is None else _WATCH)):
                if deadline.passed:
                    raise deadline.missed(f"{len(ticket.outputs)} of {len(ticket.pieces)} pieces were answered")
                if watch is not None:
                    watch(len(ticket.outputs), len(ticket.pieces))
        finally:
            ticket.abandoned = True
        return ticket.result()


# Forwards, one at a time.


def _run_here(state: _State, ticket: Ticket) -> None:
    """All of a request, in the thread of its caller."""
    try:
        while ticket.waiting:
            _run_batch(state, _next_batch(state, [ticket]))
    finally:
        with state.arrived:
            state.running = False
            if state.tickets:
                state.arrived.notify()


def _serve(state: _State) -> None:
    """Whatever waits, in the model's own thread."""
    if not state.anywhere:
        use_threads(state.num_threads)
    while True:
        with state.arrived:
            state.tickets[:] = [ticket for ticket in state.tickets if ticket.waiting and not ticket.abandoned]
            while (state.running or not state.tickets) and not state.stopped:
                state.arrived.wait()
            if state.stopped:
                return
            state.running = True
            tickets = list(state.tickets)
        try:
            _run_batch(state, _next_batch(state, tickets))
        except BaseException as error:  # a task's bug must not leave anybody waiting for ever
            for ticket in tickets:
                ticket.fail(named_failure(error))
        state.running = False  # nobody comes between: what was run is among the tickets until this thread goes on
        tickets.clear()  # until the next request, which may come much later


def _next_batch(state: _State, tickets: Sequence[Ticket]) -> list[tuple[Ticket, int]]:
    """The batch of whoever's turn it is, with all that it is cheap to run along.

    Each that waits has the same share of the model's time: who was served is next once as much was done for each of the
    others, so that long texts come up more seldom than short ones. And after one that goes on comes one that is new, if
    there is any: a table of a million rows keeps a small request waiting for a forward or two.
    """
    new = [ticket for ticket in tickets if not ticket.served] if state.went_on else []
    first = min(new or tickets, key=lambda ticket: ticket.turn)
    state.went_on = first.served
    if state.deterministic:
        batch = [(first, first.waiting.popleft())]
    else:
        agreeing = [first, *(ticket for ticket in tickets if ticket.key == first.key and ticket is not first)]
        pool = [(ticket, i) for ticket in agreeing for i in ticket.take(_AHEAD * state.max_batch_tokens)]
        costs = [ticket.costs[i] for ticket, i in pool]
        batches = cut_into_batches(costs, state.max_batch_tokens, state.forward_cost)
        chosen = next(set(places) for places in batches if 0 in places)  # 0 is the longest piece of the first
        batch = [pool[place] for place in sorted(chosen)]
        for place in reversed(range(len(pool))):
            if place not in chosen:
                pool[place][0].waiting.appendleft(pool[place][1])
    cost = Counter[Ticket]()
    for ticket, i in batch:
        cost[ticket] += ticket.costs[i]
    state.spent += state.forward_cost + cost.total()
    for ticket in cost:
        ticket.turn, ticket.served = state.spent + cost[ticket] * len(tickets), True
    return batch


def _run_batch(state: _State, batch: Sequence[tuple[Ticket, int]]) -> None:
    """One forward. If it fails, every request alone, so that only those fail that are to blame.

    Where memory ran out, both halves of the batch by themselves, down to a single piece.
    """
    batch = [(ticket, i) for ticket, i in batch if not ticket.abandoned]
    if not batch:
        return
    tickets = list(dict.fromkeys(ticket for ticket, _ in batch))
    try:
        engine = cast("Engine", _Attended(state.engine, tickets))
        outputs = state.task.forward(engine, [ticket.pieces[i] for ticket, i in batch], tickets[0].params)
        for (ticket, i), output in zip(batch, outputs, strict=True):
            ticket.give(i, output)
        return
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # not the model's failure: somebody interrupts the caller who runs this
        if len(batch) > 1 and is_out_of_memory(error):
            parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        elif len(tickets) > 1:
            parts = [[(ticket, i) for ticket, i in batch if ticket is one] for one in tickets]
        else:
            tickets[0].fail(named_failure(error))
            return
    for part in parts:  # out of the block above: the error's frames hold the memory of what has failed
        _run_batch(state, part)


class _Attended:
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


def _stop(state: _State) -> None:
    """End the thread; at the end of the process a forward must not be cut off inside torch."""
    with state.arrived:
        state.stopped = True
        state.arrived.notify()
    if state.thread not in (None, threading.current_thread()):
        state.thread.join(timeout=10)


# A fork takes along neither the thread nor what it was about to do.

_STATES: weakref.WeakSet[_State] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for state in list(_STATES):
        state.arrived, state.arriving, state.tickets, state.thread = threading.Condition(), set(), [], None
        state.running = False
        state.places = Places(available_cpus())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
