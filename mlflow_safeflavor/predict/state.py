"""What waits at a model, and who runs it."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field

from mlflow_safeflavor.machine import available_cpus
from mlflow_safeflavor.predict.places import Places
from mlflow_safeflavor.predict.ticket import Ticket
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine

__all__ = ["State", "stop"]


@dataclass(eq=False)
class State:
    """What the model's thread holds.

    Not the scheduler: else neither that nor the model could ever be freed.

    Whoever sets ``running`` runs forwards, and alone looks at what waits; the others only add to
    it.
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

    def __post_init__(self) -> None:
        _STATES.add(self)


def stop(state: State) -> None:
    """End the thread; at the end of the process a forward must not be cut off inside torch."""
    with state.arrived:
        state.stopped = True
        state.arrived.notify()
    if state.thread not in (None, threading.current_thread()):
        state.thread.join(timeout=10)


# A fork takes along neither the thread nor what it was about to do.

_STATES: weakref.WeakSet[State] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for state in list(_STATES):
        state.arrived, state.arriving, state.tickets, state.thread = (
            threading.Condition(),
            set(),
            [],
            None,
        )
        state.running = False
        state.places = Places(available_cpus())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
