"""State that a model's scheduler and its thread share."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlflow_safeflavor.machine import available_cpus
from mlflow_safeflavor.predict.permits import Permits
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["Observer", "State", "stop"]

# Called after each forward: the costs of its pieces in tokens, and its seconds.
Observer = Callable[[Sequence[int], float], None]


@dataclass(eq=False)
class State:
    """Requests at a model, and the threads that run them.

    The threads hold this and not the scheduler, which could else never be freed, nor its model.
    Tickets are listed and taken, and forwards counted, under the lock of ``arrived``.
    """

    task: Task
    engine: Engine
    max_batch_tokens: int
    forward_cost: int
    deterministic: bool
    num_threads: int
    anywhere: bool
    abreast: int
    permits: Permits = field(default_factory=lambda: Permits(available_cpus()))
    arrived: threading.Condition = field(default_factory=threading.Condition)
    arriving: set[object] = field(default_factory=set)
    tickets: list[Ticket] = field(default_factory=list)
    spent: int = 0  # cost of all forwards so far, in tokens
    went_on: bool = False  # whether the last forward was for a request served before
    running: int = 0  # forwards
    stopped: bool = False
    threads: list[threading.Thread] = field(default_factory=list)
    observer: Observer | None = None

    def __post_init__(self) -> None:
        _STATES.add(self)


def stop(state: State) -> None:
    """End the model's threads, after the forwards that they run."""
    with state.arrived:
        state.stopped = True
        state.arrived.notify_all()
    # At the end of the process a forward must not be cut off inside torch. The last reference to a
    # model may go in a thread of its own, which cannot join itself.
    for thread in state.threads:
        if thread is not threading.current_thread():
            thread.join(timeout=10)


# A fork takes along neither the threads nor the requests that it was about to run; and a lock that
# another thread holds at that moment stays locked in the child for ever, so it is made anew.
_STATES: weakref.WeakSet[State] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for state in list(_STATES):
        state.arrived, state.arriving = threading.Condition(), set()
        state.tickets, state.threads, state.running = [], [], 0
        state.permits = Permits(available_cpus())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
