"""How far a long prediction is, for people who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Watch", "shown"]

Watch = Callable[["int", "int | None"], None]
"""Told how much of how much is done; None where nobody knows how much there is."""

_PATIENCE = 2.0
"""Seconds before anything is shown."""


@contextmanager
def shown(wanted: bool | None) -> Iterator[Watch | None]:
    """A function to be told how much of how much is done; None where nobody looks.

    Args:
        wanted: None for a terminal or a notebook only, and only if it takes longer than two seconds.
    """
    if wanted is False:
        yield None
        return
    try:
        # Not among the pins of a model: servers show no bar, and a model must answer without.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield None
        return
    console = Console(stderr=True)
    if wanted is None and not (console.is_terminal or console.is_jupyter):
        yield None
        return
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    task, begun = bar.add_task("predict"), time.monotonic()

    def watch(done: int, total: int | None) -> None:
        if wanted or time.monotonic() - begun > _PATIENCE:
            bar.start()
            bar.update(task, completed=done, total=total, refresh=True)

    try:
        yield watch
    finally:
        bar.stop()
