"""How a model writes, as one value: what crosses the seam between tasks and engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Generation"]


@dataclass(frozen=True)
class Generation:
    """Settings of decoding, and what looks at each step beside them.

    Attributes:
        settings: All there is to a generation config; what the module says of its own counts for
            nothing.
        processors: Applied in turn to the scores of each step, (ids so far, scores) → scores, after
            those that the settings ask for; in tensors of torch.
        stopping: (ids so far, scores) → which rows are done, bool of shape (rows,); in tensors of
            torch.
        keep_logits: Also return the logits of each step, before any processing.
    """

    settings: Mapping[str, Any]
    processors: Sequence[Callable[..., Any]] = ()
    stopping: Sequence[Callable[..., Any]] = ()
    keep_logits: bool = False
