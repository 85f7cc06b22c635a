"""Texts to stop at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Stop", "first_stop"]


class Stop:
    """Which rows have written one of the texts to stop at."""

    def __init__(
        self, text_of: Callable[[Sequence[int]], str], stop: Sequence[str], start: int
    ) -> None:
        self.text_of, self.stop, self.start = text_of, stop, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool of shape (rows,)."""
        import torch

        written = input_ids[:, self.start :].tolist()
        done = [first_stop(self.text_of(ids), self.stop) is not None for ids in written]
        return torch.tensor(done, device=input_ids.device)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where in ``text`` the first of the texts to stop at begins."""
    return min((place for word in stop if (place := text.find(word)) >= 0), default=None)
