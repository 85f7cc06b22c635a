"""Report of rows answered twice: their differences and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["ParityReport", "Replayed", "replayed_row"]


@dataclass(frozen=True)
class Replayed:
    """One row, answered twice: recorded and now, or here and there.

    Attributes:
        row: Index of the row.
        max_difference: Largest absolute difference over the raw outputs, or over the answer where a
            server gave it; ``inf`` for another shape or anything that is no number.
        bit_identical: Whether all of that is equal bit for bit.
        problem: What is beyond tolerance, in words; None where nothing is.
        first: The first value that is not the same, tolerated or not, in words; None where all are.
        golden: Whether the row was recorded with the model; False for a row of the user's.
        differences: All absolute differences, shape (values,), float64; ``inf`` as above.
    """

    row: int
    max_difference: float
    bit_identical: bool
    problem: str | None
    first: str | None = None
    golden: bool = True
    differences: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """``different``, ``bit-identical`` or ``within tolerance``."""
        return _verdict(self.problem is None, self.bit_identical)


def _verdict(ok: bool, identical: bool) -> str:
    if not ok:
        return "different"
    return "bit-identical" if identical else "within tolerance"


@dataclass(frozen=True)
class ParityReport:
    """All rows, answered twice.

    Attributes:
        rows: One entry a row; golden rows first.
        atol: Absolute tolerance, in units of the outputs.
        rtol: Relative tolerance.
        environments: Side ("saved", "here", "server") → what it runs on, as
            ``about_process.process_facts`` has it; None for a server that does not tell. Sides
            that took no part are not there.
    """

    rows: tuple[Replayed, ...]
    atol: float
    rtol: float
    environments: Mapping[str, Mapping[str, Any] | None] = field(
        default_factory=dict, compare=False
    )

    @property
    def ok(self) -> bool:
        """Whether every row is within tolerance."""
        return all(row.problem is None for row in self.rows)

    @property
    def bit_identical(self) -> bool:
        """Whether every row is equal bit for bit."""
        return all(row.bit_identical for row in self.rows)

    @property
    def verdict(self) -> str:
        """``different``, ``bit-identical`` or ``within tolerance``: that of the worst row."""
        return _verdict(self.ok, self.bit_identical)

    @property
    def first_difference(self) -> str | None:
        """The first value beyond tolerance, else the first that is not the same, in words.

        None where all are.
        """
        # Beyond tolerance first: it is the reason for the verdict.
        found = [row.problem for row in self.rows if row.problem] + [
            row.first for row in self.rows if row.first
        ]
        return found[0] if found else None

    @property
    def max_difference(self) -> float:
        """Largest absolute difference of any value."""
        return max((row.max_difference for row in self.rows), default=0.0)


def replayed_row(
    row: int,
    differences: Sequence[np.ndarray],
    problem: str | None,
    first: str | None,
    *,
    identical: bool,
    golden: bool = True,
) -> Replayed:
    """A replayed row, of its differences: one array for each output, or for each value."""
    # numpy concatenates no empty list, which a row without outputs has.
    all_ = np.concatenate([np.zeros(0), *differences])
    return Replayed(row, float(all_.max(initial=0.0)), identical, problem, first, golden, all_)
