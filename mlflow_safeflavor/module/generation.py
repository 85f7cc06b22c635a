"""Generation: settings of decoding, as one value that tasks pass to engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Generation"]


@dataclass(frozen=True)
class Generation:
    """Settings of decoding, with processors and stopping criteria of each step.

    Attributes:
        settings: The whole generation config; the module's own counts for nothing.
        processors: Applied in turn to the scores of each step, (ids so far, scores) → scores, after
            those that the settings ask for; in tensors of torch.
        stopping: (ids so far, scores) → which rows are done, bool of shape (rows,); in tensors of
            torch.
        arguments: Arguments of a model's own ``generate`` that are no settings.
        keep_logits: Also return the logits of each step, before any processing.
    """

    settings: Mapping[str, Any]
    processors: Sequence[Callable[..., Any]] = ()
    stopping: Sequence[Callable[..., Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keep_logits: bool = False
