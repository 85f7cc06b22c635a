"""Texts that part at a near tie of two tokens, which another CPU may decide otherwise."""

from __future__ import annotations

import numpy as np

from mlflow_safeflavor.tasks.features import RowOutput

__all__ = ["up_to_first_difference"]


def up_to_first_difference(
    recorded: RowOutput, found: RowOutput
) -> tuple[RowOutput, RowOutput] | None:
    """The ``logits`` of two outputs up to the first of their ``ids`` that is not the same.

    None where all are. If the logits are near each other there, it was a near tie; behind it, the
    model continues other texts. A wrong weight shows in all logits, a broken KV cache in those of
    the second token.
    """
    old, new = recorded.get("ids", np.zeros(0)), found["ids"]
    if np.array_equal(old, new):
        return None
    both = min(len(old), len(new))
    same = int((old[:both] == new[:both]).cumprod().sum()) + 1
    return {"logits": recorded["logits"][:same]}, {"logits": found["logits"][:same]}
