"""How far a long prediction is, for people who wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Watch", "shown"]

# Told how much of how much is done; None where nobody knows how much there is.
Watch = Callable[["int", "int | None"], None]

# Seconds before anything is shown.
_PATIENCE = 2.0


@contextmanager
def shown(wanted: bool | None) -> Iterator[Watch | None]:
    """A function to be told how much of how much is done; None where nobody wants to know.

    Args:
        wanted: None for a terminal or a notebook only, and only if it takes longer than two
            seconds.
    """
    if wanted is False:
        yield None
        return
    begun = time.monotonic()
    bars: list[Progress | None] = []  # at most one; None where it is not to be seen

    def watch(done: int, total: int | None) -> None:
        # Nothing is made before it is needed: most predictions take milliseconds.
        if not bars and (wanted or time.monotonic() - begun > _PATIENCE):
            bars.append(_started_bar(anywhere=bool(wanted)))
        if bars and bars[0]:
            bars[0].update(bars[0].task_ids[0], completed=done, total=total, refresh=True)

    try:
        yield watch
    finally:
        if bars and bars[0]:
            bars[0].stop()


def _started_bar(*, anywhere: bool) -> Progress | None:
    """On a terminal or in a notebook, or ``anywhere``.

    None where rich is not installed or nobody looks.
    """
    try:
        # Not among the pins of a model: servers show no bar, and a model must answer without.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    console = Console(stderr=True)
    if not (anywhere or console.is_terminal or console.is_jupyter):
        return None
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    bar.add_task("predict")
    bar.start()
    return bar
