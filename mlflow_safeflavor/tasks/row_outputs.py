"""Outputs of any forward, row by row and together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.features import RowOutput

__all__ = ["by_row", "together"]


class _Outputs(dict[str, np.ndarray]):
    """Outputs of forward for all rows of a request; an error names those that have no rows."""

    def __init__(
        self, outputs: Mapping[str, np.ndarray], left_out: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__(outputs)
        self._left_out = left_out

    def __missing__(self, name: str) -> np.ndarray:
        if name in self._left_out:
            raise StructureError(
                "An output of forward does not have the rows of its batch as its first dimension",
                where=name,
                found=f"shape {list(self._left_out[name])}",
                hint="let forward return it with the rows first, or save the model with task='raw'",
            )
        raise KeyError(name)


class _RowOutput(dict[str, np.ndarray]):
    """Raw outputs of one row, and the shapes of outputs without a dimension of rows."""

    left_out: Mapping[str, Sequence[int]]


def by_row(outputs: Mapping[str, np.ndarray], rows: int) -> list[RowOutput]:
    """Outputs whose first dimension is the rows, row by row; the shapes of the others."""
    rowwise = {name: array for name, array in outputs.items() if array.ndim and len(array) == rows}
    left_out = {name: array.shape for name, array in outputs.items() if name not in rowwise}
    found: list[RowOutput] = []
    for i in range(rows):
        output = _RowOutput({name: array[i] for name, array in rowwise.items()})
        output.left_out = left_out
        found.append(output)
    return found


def together(outputs: Sequence[RowOutput]) -> _Outputs:
    """The outputs of all rows, as arrays with the rows first; lists where their shapes differ."""
    # An output left out in one batch is left out in all: one that happened to be as long as its
    # batch has no rows either.
    left_out: dict[str, Sequence[int]] = {}
    for output in outputs:
        left_out |= getattr(output, "left_out", {})
    found: dict[str, Any] = {}
    for name in outputs[0].keys() - left_out.keys():
        arrays = [output[name] for output in outputs]
        same = len({array.shape for array in arrays}) == 1
        # Copies in both cases: a hook may write to what it gets.
        found[name] = np.stack(arrays) if same else [array.copy() for array in arrays]
    return _Outputs(found, left_out)
