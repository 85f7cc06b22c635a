"""A thread under guard while it builds, and with it the threads that it starts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from mlflow_safeflavor.errors import TrustError
from mlflow_safeflavor.module.guard import Guard, guards, hook

__all__ = ["guarded"]

_lock = threading.Lock()
_hooked = False
_stop_following: Callable[[], None] | None = None


@contextmanager
def guarded(*own: str | os.PathLike[str], unpickles: bool = False) -> Iterator[None]:
    """Audit this thread inside the block, and threads started there until they end.

    Args:
        own: Folders that may be read beside what is installed.
        unpickles: Whether a pickle may name classes and functions.

    Raises:
        TrustError: An event was refused, even if a library caught the refusal.
    """
    guard, cause = Guard(*own, allowed=["pickle.find_class"] if unpickles else []), None
    # The caller's frame: a load may itself run inside the import of some module, which excuses
    # nothing that the model does.
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"] in (__name__, "contextlib"):
        frame = frame.f_back
    guard.began = frame
    try:
        with _watching(guard):
            yield
    except Exception as error:
        if not guard.refused:
            raise
        cause = error
    finally:
        guard.began = None  # a frame keeps all that its function holds
    # Also without an error: a library that caught the refusal went on without the file.
    if guard.refused:
        raise TrustError(
            "Building the model tried what no model may do while it is built",
            where=", ".join(map(str, own)),
            wanted="nothing but the files of the model and of installed packages",
            found="it " + "; it ".join(dict.fromkeys(guard.refused)),
            hint="if you did not save this model, do not use it; if you did, take this out of "
            "what it runs when "
            'it is built, or save it with graph="only", which builds nothing',
        ) from cause


@contextmanager
def _watching(guard: Guard) -> Iterator[None]:
    thread = threading.get_ident()
    before = guards.get(thread)  # of a block around this one
    _watch(thread, guard)
    try:
        yield
    finally:
        _watch(thread, before)


def _watch(thread: int, guard: Guard | None) -> None:
    global _hooked, _stop_following
    with _lock:
        if guard is None:
            guards.pop(thread, None)
        else:
            guards[thread] = guard
        if not _hooked:
            sys.addaudithook(hook)
            _hooked = True
        if guards and _stop_following is None:
            _stop_following = _follow_threads()
        elif not guards and _stop_following is not None:
            _stop_following()
            _stop_following = None


def _follow_threads() -> Callable[[], None]:
    """Guard threads that a guarded one starts; returns a function that stops it."""
    # By threading.Thread.start: Python before 3.12 reports no event of a started thread.
    before = threading.Thread.start

    def start(self: threading.Thread) -> None:
        guard = guards.get(threading.get_ident())
        if guard is not None:
            self.run = partial(_run, guard, self.run)  # type: ignore[method-assign]
        before(self)

    def undo() -> None:
        if threading.Thread.start is start:  # else other code has replaced it since, and calls ours
            threading.Thread.start = before  # type: ignore[method-assign]

    threading.Thread.start = start  # type: ignore[method-assign]
    return undo


def _run(guard: Guard, run: Callable[[], None]) -> None:
    with _watching(guard):
        run()
