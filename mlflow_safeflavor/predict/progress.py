"""Progress of a long prediction or download, as a bar of tqdm's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Progress", "bar_of", "shown"]

# Told how much of how much is done; None where the total is not known.
Progress = Callable[["int", "int | None"], None]

# Seconds before anything is shown.
_PATIENCE = 2.0


def shown(wanted: bool | None) -> AbstractContextManager[Progress | None]:
    """A function to be told how much of how much is done; None where no bar is wanted.

    Args:
        wanted: None for a terminal or a notebook only, and only if it takes longer than two
            seconds.
    """
    return nullcontext() if wanted is False else _shown(wanted)


@contextmanager
def _shown(wanted: bool | None) -> Iterator[Progress]:
    bar: tqdm[None] | None = None

    def tell(done: int, total: int | None) -> None:
        nonlocal bar
        if bar is None:  # the first call comes after half a second, which few predictions take
            bar = bar_of("predict", total, wanted)
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()


def bar_of(desc: str, total: int | None, wanted: bool | None, **looks: Any) -> tqdm[None]:
    """A bar, with ``disable`` set where none is wanted.

    Args:
        desc: Word before it.
        total: What it counts to; None where that is not known.
        wanted: See ``shown``.
        looks: More arguments of tqdm's, such as a unit.
    """
    # Not at the top: servers show no bar. huggingface_hub, which tokenizers needs, brings tqdm.
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # chosen when it is imported
        monitor_interval = 0  # else tqdm starts a thread that outlives the prediction
        # tqdm's lock is one for the process, and Ctrl-C in the middle of drawing any bar leaves it
        # with the thread that was interrupted: another thread would wait for ever.
        _lock = threading.RLock()

    return Bar(
        desc=desc,
        total=total,
        delay=0 if wanted else _PATIENCE,
        disable=None if wanted is None else False,
        leave=False,
        mininterval=0,
        miniters=1,  # else tqdm leaves out calls that come fast
        **looks,
    )
