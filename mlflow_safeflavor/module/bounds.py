"""Bounds on what a config may make its classes ask for: numbers, time, and objects of Python.

``memory`` counts tensors and modules while they are made. Python's own lists and dicts, and loops,
it does not see: 3 million labels without a name were two dicts of 1 GB before the first tensor was.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlflow_safeflavor.artifact.inventory_file import Inventory
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import StructureError

__all__ = ["find_unexplained", "require_explained", "sheltered", "within"]

Result = TypeVar("Result")

# No number up to this needs a stored tensor of that size. Of the 820 configs of transformers 5.23,
# two have a larger one by default whose name is not in the table below.
_FLOOR = 2**20

# More than importing all of transformers makes.
_OBJECTS = 4_000_000

_NAMES: tuple[tuple[str, int], ...] = (
    # Configs make a name for each label, twice.
    (r"num_labels", 2**16),
    # Rotary positions need no table: Llama 4 says 10,485,760. Where there is one, it is counted as
    # a tensor.
    (r"max_.*(positions?|embeddings|length)|.*(chunk|context)_?(size|length)", 2**24),
    # Hashes and frequencies, which are only computed with.
    (r".*(theta|base|period|timescale)", 2**40),
)


def find_unexplained(
    config: Mapping[str, Any], inventory: Inventory
) -> Iterator[tuple[str, int, int]]:
    """Key, number and bound of whole numbers beyond the sizes of stored tensors and ``_NAMES``."""
    largest = max((size for row in inventory.rows.values() for size in row.shape), default=0)
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif type(value) is int:  # a bool is an int, too, and bounds nothing
            most = max(
                largest, next((most for name, most in _NAMES if re.fullmatch(name, key)), _FLOOR)
            )
            if abs(value) > most:
                yield key, value, most


def require_explained(config: Mapping[str, Any] | None, inventory: Inventory, where: str) -> None:
    """Raise ``StructureError`` for a number of a config far beyond the stored tensors."""
    for key, value, most in find_unexplained(config or {}, inventory):
        raise StructureError(
            "The config asks for far more than the stored tensors take",
            where=f"{where}, {key}",
            wanted=f"at most {most:,}",
            # Python refuses to write out numbers of more than 4,300 digits (ValueError).
            found=f"{value:,}" if value.bit_length() < 100 else "a number of more than 30 digits",
            hint=FETCH_AGAIN,
        )


# Threads that must not be interrupted now, by identity: they change what outlives the call.
sheltered: set[int] = set()


class _TooMuch(BaseException):
    """Raised in the watched thread; no ``Exception``, since constructors catch those."""


def within(
    most_bytes: int,
    function: Callable[[], Result],
    *,
    what: str = "Building the model",
    where: str = "a config or constructor argument",
    most_seconds: float = 30.0,
    objects: int = _OBJECTS,
    first_look: float = 0.25,
) -> Result:
    """Call a function, and interrupt it when it takes far more time or memory than it could need.

    Another thread looks now and then, and only at what takes longer than the first look; it ends
    with the call. A single call of C, which nothing can interrupt, is let finish.

    Args:
        most_bytes: Memory that the call may add, beside 1 GB.
        function: What is called.
        what: What it does, for the message.
        where: What decides how much that takes.
        most_seconds: Seconds of the processor that this thread may take: other threads and slow
            disks do not count. 10 more for each GB of ``most_bytes``.
        objects: How many objects of Python may be added before memory counts, as other threads may
            need any amount of that at the same time.
        first_look: Seconds before the first look.

    Raises:
        StructureError: It was interrupted.
    """
    watchdog = _Watchdog(most_bytes + 2**30, most_seconds + most_bytes / 1e8, objects, first_look)
    # All in one frame: the exception may come at any call, also that of an __exit__.
    try:
        try:
            return function()
        finally:
            watchdog.stop()
    except _TooMuch:
        watchdog.stop()  # it may have come inside stop() above
    raise StructureError(
        f"{what} takes far more than it could need",
        where=where,
        found=watchdog.reason,
        hint=FETCH_AGAIN,
    )


class _Watchdog:
    """A thread that looks at the thread that made it, and raises ``_TooMuch`` there."""

    NEXT_LOOK, UNWINDING = 0.05, 5.0

    def __init__(
        self, most_bytes: int, most_seconds: float, objects: int, first_look: float
    ) -> None:
        self.most_bytes, self.most_seconds, self.objects = most_bytes, most_seconds, objects
        self.reason: str | None = None  # set once: what was found first is what is told
        self._watched = threading.get_ident()
        self._seconds = _seconds_of(self._watched)
        self._begin = (self._seconds(), sys.getallocatedblocks(), _private_bytes())
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._look, args=(first_look,), name="safeflavor-bounds", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and let what it has not raised yet come here."""
        self._over.set()
        self._thread.join()
        if self.reason is None:
            return
        # Raised, not taken back: CPython only stops looking for an exception at every call of the
        # process when one has come, and 3.11 hangs in the next call that is traced (by coverage, by
        # a debugger) while it looks for one that is not there.
        try:
            while True:  # whoever is called in between (a ``__del__``) may swallow one
                _raise_in(self._watched, _TooMuch)  # in place of one that is on its way
                time.sleep(0)
        except _TooMuch:
            pass

    def _look(self, wait: float) -> None:
        while not self._over.wait(wait):
            raised = False
            self.reason = self.reason or self._found()
            # Again after each wait: a library's bare ``except`` may have swallowed the last one.
            if self.reason is not None and not self._over.is_set():
                raised = _raise_in(self._watched, _TooMuch, but=sheltered)
            wait = self.UNWINDING if raised else self.NEXT_LOOK

    def _found(self) -> str | None:
        seconds, objects, used = self._begin
        if self._seconds() - seconds > self.most_seconds:
            return f"more than {self.most_seconds:.0f} seconds"
        objects = max(0, sys.getallocatedblocks() - objects)
        if objects >= self.objects and _private_bytes() - used > self.most_bytes:
            return f"more than {self.most_bytes:,} bytes, and {objects:,} objects of Python"
        return None


def _raise_in(thread: int, error: type[BaseException], but: Collection[int] = ()) -> bool:
    """Raise in a thread at its next step, unless it is in ``but``; whether it was raised."""
    call = ctypes.pythonapi.PyThreadState_SetAsyncExc
    identity, raised = ctypes.c_ulong(thread), ctypes.py_object(error)
    # In one expression, and ctypes holds the interpreter: no thread runs between look and call.
    return thread not in but and bool(call(identity, raised))


def _seconds_of(thread: int) -> Callable[[], float]:
    """A clock of the processor time of a thread, or of the wall where the system has none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _private_bytes() -> int:
    """Resident memory of this process that is no file's; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()  # in pages
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
