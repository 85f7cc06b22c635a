"""Stop texts: generation of a row ends where it has written one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Stop", "first_stop", "unfinished_stop"]


class Stop:
    """Stopping criterion of transformers: rows that have written one of the stop texts."""

    def __init__(
        self, text_of: Callable[[Sequence[int]], str], stop: Sequence[str], start: int
    ) -> None:
        self.text_of, self.stop, self.start = text_of, stop, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool of shape (rows,)."""
        import torch

        # All new tokens decoded again: a stop text may lie anywhere in the last ones, and a token
        # by itself may be part of a character.
        written = input_ids[:, self.start :].tolist()
        done = [first_stop(self.text_of(ids), self.stop) is not None for ids in written]
        return torch.tensor(done, device=input_ids.device)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Index in ``text`` of the first stop text; None without one."""
    return min((place for word in stop if (place := text.find(word)) >= 0), default=None)


def unfinished_stop(text: str, stop: Sequence[str]) -> int:
    """Index in ``text`` from which on it may be the beginning of a stop text; else its length."""
    longest = max(map(len, stop), default=1) - 1  # characters of a stop text without its last one
    return next(
        (i for i in range(max(0, len(text) - longest), len(text)) if _begins(text[i:], stop)),
        len(text),
    )


def _begins(end: str, stop: Sequence[str]) -> bool:
    return any(word.startswith(end) for word in stop)
