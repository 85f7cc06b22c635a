"""Bounds on what a config may make its classes ask for: numbers, time, and objects of Python.

``memory`` counts tensors and layers while they are made. Python's own lists and dicts, and loops, it does not see: 3 million
labels without a name were two dicts of 1 GB before the first tensor was.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow_safeflavor.artifact import WAY_OUT
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.inventory import Inventory

__all__ = ["Bounded", "find_unexplained", "require_explained"]

_FLOOR = 2**20
"""No number up to this needs an explanation. Of the 820 configs of transformers 5.23, two have a larger one by default
whose name is not in the table below."""

_NAMES: tuple[tuple[str, int], ...] = (
    # Configs make a name for each label, twice.
    (r"num_labels", 2**16),
    # Rotary positions need no table: Llama 4 says 10,485,760. Where there is one, it is counted as a tensor.
    (r"max_.*(positions?|embeddings|length)|.*(chunk|context)_?(size|length)", 2**24),
    # What is only computed with; hashes and frequencies.
    (r".*(theta|base|period|timescale)", 2**40),
)


def find_unexplained(config: Mapping[str, Any], inventory: Inventory) -> Iterator[tuple[str, int, int]]:
    """Whole numbers of a config that no stored tensor has as a size and nothing else explains: key, number, bound."""
    largest = max((size for row in inventory.rows.values() for size in row.shape), default=0)
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        elif type(value) is int:
            most = max(largest, next((most for name, most in _NAMES if re.fullmatch(name, key)), _FLOOR))
            if abs(value) > most:
                yield key, value, most


def require_explained(config: Mapping[str, Any] | None, inventory: Inventory, where: str) -> None:
    """Refuse a config with numbers far beyond the stored tensors. Raises ``StructureError`` naming key and number."""
    for key, value, most in find_unexplained(config or {}, inventory):
        raise StructureError(
            "The config asks for far more than the stored tensors take",
            where=f"{where}, {key}",
            wanted=f"at most {most:,}",
            found=f"{value:,}" if value.bit_length() < 100 else "a number of more than 30 digits",
            way_out=WAY_OUT,
        )


class _TooMuch(BaseException):
    """Raised in the thread that builds. Not an ``Exception``: constructors catch those."""


class Bounded:
    """A block that is interrupted when it takes far more time or objects than what it builds could need.

    Another thread looks now and then, and only at blocks that take longer than a quarter of a second. It ends with the
    block. A single call of C, which nothing can interrupt, is let finish.

    Args:
        most_bytes: Memory that the block may add, beside 1 GB; counted only where Python's objects have grown, too,
            as other threads may need any amount at the same time.
        most_seconds: Seconds of the processor that this thread may take: neither other threads nor a slow disk count.

    Raises:
        StructureError: It was interrupted.
    """

    FIRST_LOOK, NEXT_LOOK = 0.25, 0.05
    OBJECTS = 4_000_000
    """More than importing all of transformers makes."""

    def __init__(self, most_bytes: int, most_seconds: float = 30.0) -> None:
        self.most_bytes, self.most_seconds = most_bytes + 2**30, most_seconds + most_bytes / 100e6
        self._over = threading.Event()
        self._reason: str | None = None

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._seconds = _seconds_of(self._thread)
        self._begin = (self._seconds(), sys.getallocatedblocks(), _private_bytes())
        self._watch = threading.Thread(target=self._look, name="safeflavor-bounds", daemon=True)
        self._watch.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._stop()
        except _TooMuch:  # not again: the other thread gives a second to unwind
            self._stop()
        if self._reason is not None and (kind is None or issubclass(kind, _TooMuch)):
            raise StructureError(
                "Building the model takes far more than its stored tensors could need",
                where="a config or constructor argument",
                found=self._reason,
                way_out=WAY_OUT,
            ) from None

    def _stop(self) -> None:
        self._over.set()
        self._watch.join()
        _raise_in(self._thread, None)

    def _look(self) -> None:
        wait = self.FIRST_LOOK
        while not self._over.wait(wait):
            self._reason = self._reason or self._found()
            if self._reason is not None:
                _raise_in(self._thread, _TooMuch)
            wait = self.NEXT_LOOK if self._reason is None else 1.0  # to unwind

    def _found(self) -> str | None:
        seconds, objects, used = self._begin
        if self._seconds() - seconds > self.most_seconds:
            return f"more than {self.most_seconds:.0f} seconds"
        objects = sys.getallocatedblocks() - objects
        if objects > self.OBJECTS and _private_bytes() - used > self.most_bytes:
            return f"{objects:,} objects of Python and more than {self.most_bytes:,} bytes"
        return None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise in a thread at its next step, or take back what was not raised yet."""
    kind = ctypes.py_object(error) if error is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


def _seconds_of(thread: int) -> Callable[[], float]:
    """A clock of the processor time of a thread; of the time on the wall where the system has none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _private_bytes() -> int:
    """Resident memory of this process that is no file's; 0 where the system does not say."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
