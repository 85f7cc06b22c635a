"""Windows of a long sound, which overlap so that each frame has heard what is around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.params import Param

__all__ = ["CHUNK_LENGTH", "STRIDE_LENGTH", "Windows", "windows_of"]

CHUNK_LENGTH = Param(
    "chunk_length_s",
    "double",
    default=0.0,
    wanted="seconds of a window, or 0 for the whole sound at once",
    allows=lambda value: value >= 0,
    none_is=0.0,
)
STRIDE_LENGTH = Param(
    "stride_length_s",
    "double",
    default=[],
    wanted="a list of the seconds that a window shares with its neighbours on the left and on the "
    "right, of one number for both, or of none for a sixth of chunk_length_s",
    allows=lambda value: len(value) <= 2 and all(side >= 0 for side in value),
    none_is=[],
    many=True,
)


@dataclass(frozen=True)
class Windows:
    """Windows of a sound, all lengths in samples.

    Attributes:
        length: Of a window; the last one may be shorter.
        left: What a window begins with of the one before.
        right: What it ends with of the one behind.
    """

    length: int
    left: int
    right: int

    @property
    def step(self) -> int:
        """From the start of a window to that of the next one."""
        return self.length - self.left - self.right

    def count(self, samples: int) -> int:
        """Number of windows, without making them: a cap comes first."""
        return 1 + max(0, -(-(samples - self.length) // self.step))

    def of(self, samples: int) -> list[tuple[int, int, int, int]]:
        """Start and end of each window, and its overlaps on the left and right, those inside."""
        last = self.count(samples) - 1
        return [
            (
                i * self.step,
                min(i * self.step + self.length, samples),
                self.left if i else 0,
                self.right if i < last else 0,
            )
            for i in range(last + 1)
        ]


def windows_of(params: Mapping[str, Any], rate: int, align: int) -> Windows | None:
    """The windows that params ask for; None for the whole sound at once.

    Args:
        params: With ``CHUNK_LENGTH`` and ``STRIDE_LENGTH``.
        rate: Samples a second.
        align: Samples of an output of the model: lengths are rounded to whole ones.

    Raises:
        InputError: The overlaps leave nothing of a window.
    """
    length, sides = params["chunk_length_s"], params["stride_length_s"] or [None]
    if not length:
        return None
    samples = [
        # In the order of transformers' pipeline, for the same rounding.
        int(round((length / 6 if side is None else side) * rate / align) * align)
        for side in (sides[0], sides[-1])
    ]
    found = Windows(int(round(length * rate / align) * align), *samples)
    if found.step < 1:
        raise InputError(
            "A param has a value that is not allowed",
            where="params, 'chunk_length_s' and 'stride_length_s'",
            wanted=f"a window longer than its overlaps, in whole steps of {align} samples",
            found=f"{found.length} samples with overlaps of {found.left} and {found.right}",
        )
    return found
