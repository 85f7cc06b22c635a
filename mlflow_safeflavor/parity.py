"""Golden rows: recorded when a model is saved, replayed whenever it is loaded.

A replay is the proof that matters to a user, and it warms the model up on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlflow_safeflavor.artifact import WAY_OUT, Layout, read_json, write_json
from mlflow_safeflavor.errors import IntegrityError, ParityError
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput, Task
from mlflow_safeflavor.tensors import read_arrays, write_arrays

__all__ = ["TOLERANCES", "ParityReport", "Predictor", "Replayed", "record", "replay", "require_parity"]

# Other CPUs, thread counts and kernels round differently; 1e-5 was seen in float32. A wrong or
# unwritten weight is orders of magnitude away. A half precision number has 8 or 11 bits.
TOLERANCES = {
    "float32": {"atol": 1e-4, "rtol": 1e-4},
    "float16": {"atol": 1e-2, "rtol": 1e-2},
    "bfloat16": {"atol": 5e-2, "rtol": 5e-2},
}

_LOOSEST = max(number for tolerance in TOLERANCES.values() for number in tolerance.values())
_VERSION = 1


class Predictor(Protocol):
    """What parity needs of a loaded model."""

    @property
    def task(self) -> Task:
        """What it is asked."""
        ...

    def answer(
        self, rows: Sequence[Row], params: Mapping[str, Any] | None = None
    ) -> tuple[list[dict[str, Any]], list[RowOutput]]:
        """Answers and raw outputs, one each a row."""
        ...


@dataclass(frozen=True)
class Replayed:
    """One golden row, then and now.

    Attributes:
        row: Index of the row.
        max_difference: Largest absolute difference over the raw outputs; ``inf`` for another shape.
        bit_identical: Whether raw outputs are equal bit for bit.
        problem: What is beyond tolerance, in words; None where nothing is.
    """

    row: int
    max_difference: float
    bit_identical: bool
    problem: str | None


@dataclass(frozen=True)
class ParityReport:
    """All golden rows, then and now.

    Attributes:
        rows: One entry a golden row.
        atol: Absolute tolerance, in units of the outputs.
        rtol: Relative tolerance.
    """

    rows: tuple[Replayed, ...]
    atol: float
    rtol: float

    @property
    def ok(self) -> bool:
        """Whether every row is within tolerance."""
        return all(row.problem is None for row in self.rows)

    @property
    def bit_identical(self) -> bool:
        """Whether every row is equal bit for bit."""
        return all(row.bit_identical for row in self.rows)

    @property
    def max_difference(self) -> float:
        """Largest absolute difference of any raw output."""
        return max((row.max_difference for row in self.rows), default=0.0)


def record(model: Predictor, rows: Sequence[Row], dtype: str, layout: Layout) -> list[dict[str, Any]]:
    """Answer ``rows``, and write features, raw outputs and answers to the artifact. Returns the answers."""
    features = _features(model, rows)
    answers, outputs = model.answer(rows)
    arrays = {
        f"{index}.{part}.{name}": np.ascontiguousarray(value)
        for part, rowwise in (("input", features), ("output", outputs))
        for index, named in enumerate(rowwise)
        for name, value in named.items()
    }
    write_arrays(arrays, layout.parity_tensors)
    write_json(
        layout.parity,
        {
            "version": _VERSION,
            "rows": [model.task.to_record(row) for row in rows],
            "answers": [model.task.to_record(answer) for answer in answers],
            "tolerance": TOLERANCES[dtype],
        },
    )
    return answers


def _features(model: Predictor, rows: Sequence[Row]) -> list[Features]:
    """Rows as the tokenizer encodes them: recorded too, so that a tokenizer that drifted is named as such."""
    encoded = model.task.encode(rows, model.task.check_params(None))
    return [{name: v for name, v in row.items() if isinstance(v, (list, np.ndarray))} for row in encoded]


def replay(model: Predictor, layout: Layout) -> ParityReport:
    """Answer the recorded rows again and compare.

    Raises:
        IntegrityError: The recording is malformed.
    """
    recorded = read_json(layout.parity)
    arrays = read_arrays(layout.parity_tensors)
    try:
        answers, tolerance = recorded["answers"], recorded["tolerance"]
        rows = [
            model.task.from_record(row, _named(arrays, f"{index}.input.")) for index, row in enumerate(recorded["rows"])
        ]
        atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
        if recorded["version"] != _VERSION or len(rows) != len(answers) or not rows:
            raise ValueError(f"version {recorded['version']!r}, {len(rows)} rows, {len(answers)} answers")
        if not (0 <= atol <= _LOOSEST and 0 <= rtol <= _LOOSEST):
            raise ValueError(f"tolerances {atol}, {rtol}: with these, any answer would do")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            "The golden rows are malformed", where=layout.name_of(layout.parity), found=error, way_out=WAY_OUT
        ) from None
    features = _features(model, rows)
    found, outputs = model.answer(rows)
    replayed = []
    for index in range(len(rows)):
        problems = [
            *_differing_arrays(index, "input", features[index], arrays, 0.0, 0.0),
            *_differing_arrays(index, "output", outputs[index], arrays, atol, rtol),
            *_differing_values(f"row {index}", answers[index], model.task.to_record(found[index]), atol, rtol),
        ]
        differences = [
            _max_difference(arrays.get(f"{index}.output.{name}"), value) for name, value in outputs[index].items()
        ]
        identical = not any(_differing_arrays(index, "output", outputs[index], arrays, 0.0, 0.0))
        replayed.append(Replayed(index, max(differences, default=0.0), identical, problems[0] if problems else None))
    return ParityReport(tuple(replayed), atol, rtol)


def require_parity(report: ParityReport, layout: Layout) -> None:
    """Refuse a model that answers its golden rows differently now.

    Raises:
        ParityError: A row is beyond tolerance.
    """
    wrong = [row for row in report.rows if row.problem]
    if wrong:
        raise ParityError(
            "The model answers recorded rows differently from when it was saved",
            where=f"{layout.name_of(layout.parity)}, {len(wrong)} of {len(report.rows)} rows",
            wanted=f"within atol {report.atol:g}, rtol {report.rtol:g}",
            found=wrong[0].problem,
            way_out="install the pinned versions, or save the model again in this environment",
        )


def _differing_arrays(
    index: int, part: str, found: Mapping[str, Any], recorded: Mapping[str, np.ndarray], atol: float, rtol: float
) -> Iterator[str]:
    wanted = _named(recorded, f"{index}.{part}.")
    for name in sorted(wanted.keys() | found.keys()):
        where = f"row {index}, {part} {name}"
        if name not in wanted or name not in found:
            yield f"{where}: {'is new' if name in found else 'is gone'}"
            continue
        old, new = wanted[name], np.asarray(found[name])
        if old.shape != new.shape:
            yield f"{where}: shape {list(new.shape)}, recorded {list(old.shape)}"
        elif not np.allclose(new, old, atol=atol, rtol=rtol, equal_nan=True):
            yield f"{where}: differs by up to {_max_difference(old, new):.3g}"


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _max_difference(old: np.ndarray | None, new: np.ndarray) -> float:
    if old is None or old.shape != new.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64))
    same = np.isclose(new, old, atol=0, rtol=0, equal_nan=True)  # infinities and NaNs that agree
    worst = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    return float(worst.max(initial=0.0))


def _differing_values(where: str, wanted: Any, found: Any, atol: float, rtol: float) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from _differing_values(f"{where}, {key}", wanted[key], found[key], atol, rtol)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (old, new) in enumerate(zip(wanted, found, strict=True)):
            yield from _differing_values(f"{where}[{index}]", old, new, atol, rtol)
    elif isinstance(wanted, float) and isinstance(found, float):
        if not np.isclose(found, wanted, atol=atol, rtol=rtol, equal_nan=True):
            yield f"{where}: {found!r}, recorded {wanted!r}"
    elif wanted != found:
        yield f"{where}: {found!r}, recorded {wanted!r}"
