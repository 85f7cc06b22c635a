"""Golden rows: recorded when a model is saved, replayed whenever it is loaded, compared with what a server answers.

A replay is the proof that matters to a user, and it warms the model up on the way.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlflow_safeflavor.artifact.arrays import read_arrays, write_arrays
from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import WAY_OUT
from mlflow_safeflavor.errors import IntegrityError, ParityError
from mlflow_safeflavor.module.random_state import kept_random_state
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput, Task
from mlflow_safeflavor.tasks.engine import Engine

__all__ = [
    "TOLERANCES",
    "Golden",
    "ParityReport",
    "Predictor",
    "Replayed",
    "compare_answers",
    "read_golden",
    "record",
    "replay",
    "require_parity",
]

# Other CPUs, thread counts and kernels round differently; 1e-5 was seen in float32. A wrong or
# unwritten weight is orders of magnitude away. A half precision number has 8 or 11 bits. In float64 5e-13 was seen, by
# another number of threads in a badly conditioned solve.
TOLERANCES = {
    "float64": {"atol": 1e-8, "rtol": 1e-8},
    "float32": {"atol": 1e-4, "rtol": 1e-4},
    "float16": {"atol": 1e-2, "rtol": 1e-2},
    "bfloat16": {"atol": 5e-2, "rtol": 5e-2},
}

_COARSEST = TOLERANCES["bfloat16"]
_LOOSEST = max(number for tolerance in TOLERANCES.values() for number in tolerance.values())
_VERSION = 1


class Predictor(Protocol):
    """What parity needs of a loaded model."""

    @property
    def task(self) -> Task:
        """What it is asked."""
        ...

    @property
    def engine(self) -> Engine:
        """What answers."""
        ...

    def answer(
        self, rows: Sequence[Row], params: Mapping[str, Any] | None = None
    ) -> tuple[list[dict[str, Any]], list[RowOutput]]:
        """Answers and raw outputs, one each a row."""
        ...


@dataclass(frozen=True)
class Replayed:
    """One row, answered twice: recorded and now, or here and there.

    Attributes:
        row: Index of the row.
        max_difference: Largest absolute difference over the raw outputs, or over the answer where a server gave
            it; ``inf`` for another shape or anything that is no number.
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
        environments: Side ("saved", "here", "server") → what it runs on, as ``about_process.describe_process`` has it;
            None for a server that does not tell. Sides that took no part are not there.
    """

    rows: tuple[Replayed, ...]
    atol: float
    rtol: float
    environments: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict, compare=False)

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
        """The first value beyond tolerance, else the first that is not the same, in words; None where all are."""
        found = [row.problem for row in self.rows if row.problem] + [row.first for row in self.rows if row.first]
        return found[0] if found else None

    @property
    def max_difference(self) -> float:
        """Largest absolute difference of any value."""
        return max((row.max_difference for row in self.rows), default=0.0)


def record(model: Predictor, rows: Sequence[Row], dtypes: Collection[str], layout: Layout) -> list[dict[str, Any]]:
    """Answer ``rows``, and write features, raw outputs and answers to the artifact. Returns the answers.

    The tolerance is that of the coarsest of ``dtypes``.
    """
    features = _features(model, rows)
    answers, outputs = model.answer(rows, model.task.golden(model.task.config))
    # Not ascontiguousarray, which would give a single number a dimension.
    arrays = {
        f"{index}.{part}.{name}": np.asarray(value, order="C")
        for part, rowwise in (("input", features), ("output", outputs))
        for index, named in enumerate(rowwise)
        for name, value in named.items()
    }
    facts, tensors = layout.golden(model.engine.name)
    write_arrays(arrays, tensors)
    write_json(
        facts,
        {
            "version": _VERSION,
            "rows": [model.task.to_record(row) for row in rows],
            "answers": [model.task.to_record(answer) for answer in answers],
            "tolerance": max((TOLERANCES.get(dtype, _COARSEST) for dtype in dtypes), key=lambda t: t["atol"]),
        },
    )
    return answers


def _features(model: Predictor, rows: Sequence[Row]) -> list[Features]:
    """Rows as they are encoded, where the task records that."""
    if not model.task.records_features:
        return [{} for _ in rows]
    encoded = model.task.uncapped.encoded(rows, model.task.check_params(model.task.golden(model.task.config)))
    return [_recordable(model.task.pieces(row)) for row in encoded]


def _recordable(pieces: Sequence[Features]) -> Features:
    """The lists and arrays of all pieces of a row; those of the second piece on under its number."""
    return {
        f"{i}.{name}" if i else name: value
        for i, piece in enumerate(pieces)
        for name, value in piece.items()
        if isinstance(value, (list, np.ndarray))
    }


@dataclass(frozen=True)
class Golden:
    """What ``record`` wrote.

    Attributes:
        rows: Rows as JSON.
        answers: What was answered to them, as JSON.
        arrays: Encoded inputs and raw outputs, ``INDEX.input.NAME`` and ``INDEX.output.NAME``.
        atol: Absolute tolerance, in units of the outputs.
        rtol: Relative tolerance.
    """

    rows: list[Any]
    answers: list[Any]
    arrays: Mapping[str, np.ndarray]
    atol: float
    rtol: float

    def inputs(self, index: int) -> dict[str, np.ndarray]:
        """Encoded inputs of one row, by name."""
        return _named(self.arrays, f"{index}.input.")

    def outputs(self, index: int) -> dict[str, np.ndarray]:
        """Raw outputs of one row, by name."""
        return _named(self.arrays, f"{index}.output.")


def read_golden(layout: Layout, engine: str) -> Golden:
    """Read the golden rows that an engine is compared with.

    Raises:
        IntegrityError: The recording is malformed.
    """
    facts, tensors = layout.recorded(engine)
    recorded = layout.read_json(facts)
    arrays = read_arrays(layout.read_bytes(tensors), tensors.name)
    try:
        rows, answers, tolerance = list(recorded["rows"]), recorded["answers"], recorded["tolerance"]
        atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
        if recorded["version"] != _VERSION or len(rows) != len(answers) or not rows:
            raise ValueError(f"version {recorded['version']!r}, {len(rows)} rows, {len(answers)} answers")
        if not (0 <= atol <= _LOOSEST and 0 <= rtol <= _LOOSEST):
            raise ValueError(f"tolerances {atol}, {rtol}: with these, any answer would do")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            "The golden rows are malformed", where=layout.name_of(facts), found=error, way_out=WAY_OUT
        ) from None
    return Golden(rows, answers, arrays, atol, rtol)


def replay(model: Predictor, layout: Layout, dtype: str = "") -> ParityReport:
    """Answer the recorded rows again and compare.

    Args:
        model: What answers.
        layout: Where they are recorded.
        dtype: What it computes in, if other than what it was saved in.

    Raises:
        IntegrityError: The recording is malformed.
    """
    golden = read_golden(layout, model.engine.name)
    answers, least = golden.answers, TOLERANCES.get(dtype, {"atol": 0.0, "rtol": 0.0})
    atol, rtol = max(golden.atol, least["atol"]), max(golden.rtol, least["rtol"])
    rows = [model.task.from_record(row, golden.inputs(index)) for index, row in enumerate(golden.rows)]
    features = _features(model, rows)
    with kept_random_state():
        found, outputs = model.answer(rows, model.task.golden(model.task.config))
    replayed = []
    said: list[Any] = []
    for index in range(len(rows)):
        # Where the model chose another token at a near tie, what it said next is no longer an answer to the same.
        parts = model.task.comparable(golden.outputs(index), outputs[index])
        wanted, got = parts or (golden.outputs(index), outputs[index])
        answered = () if parts else (answers[index], model.task.to_record(found[index]))
        problems = [
            *_differing_arrays(index, "input", features[index], golden.inputs(index), 0.0, 0.0),
            *_differing_arrays(index, "output", got, wanted, atol, rtol),
        ]
        differing = list(_differing_values(f"row {index}", *answered, atol, rtol)) if answered else []
        if differing and not problems:
            # Two labels may be so near that rounding orders them. What the recorded outputs say here is then the test.
            said = said or _said_by_outputs(model.task.uncapped, rows, golden)
            differing = list(_differing_values(f"row {index}", answers[index], said[index], atol, rtol))
        problems += differing
        differences = [_differences(wanted.get(name), value) for name, value in got.items()]
        inexact = list(_differing_arrays(index, "output", got, wanted, 0.0, 0.0))
        first = next(iter([*inexact, *problems]), None)
        problem = problems[0] if problems else None
        replayed.append(_replayed(index, differences, problem, first, identical=not inexact))
    return ParityReport(tuple(replayed), atol, rtol)


def _said_by_outputs(task: Task, rows: Sequence[Row], golden: Golden) -> list[Any]:
    """Answers made here of the recorded outputs, as JSON."""
    params = task.check_params(task.golden(task.config))
    outputs = [golden.outputs(index) for index in range(len(rows))]
    with kept_random_state():
        answers = task.decoded(rows, task.encoded(rows, params), outputs, params)
    return [task.to_record(answer) for answer in answers]


def _replayed(
    row: int,
    differences: Sequence[np.ndarray],
    problem: str | None,
    first: str | None,
    *,
    identical: bool,
    golden: bool = True,
) -> Replayed:
    all_ = np.concatenate([np.zeros(0), *differences])
    return Replayed(row, float(all_.max(initial=0.0)), identical, problem, first, golden, all_)


def require_parity(report: ParityReport, layout: Layout, engine: str) -> None:
    """Refuse a model that answers its golden rows differently now.

    Raises:
        ParityError: A row is beyond tolerance.
    """
    wrong = [row for row in report.rows if row.problem]
    if wrong:
        raise ParityError(
            "The model answers recorded rows differently from when it was saved",
            where=f"{layout.name_of(layout.recorded(engine)[0])}, {len(wrong)} of {len(report.rows)} rows",
            wanted=f"within atol {report.atol:g}, rtol {report.rtol:g}",
            found=wrong[0].problem,
            way_out="save the model again in this environment",
        )


def _differing_arrays(
    index: int, part: str, found: Mapping[str, Any], wanted: Mapping[str, np.ndarray], atol: float, rtol: float
) -> Iterator[str]:
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
    return float(_differences(old, new).max(initial=0.0))


def _differences(old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Absolute differences, flat; a single ``inf`` for another shape."""
    if old is None or old.shape != new.shape:
        return np.full(1, np.inf)
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64))
    same = np.isclose(new, old, atol=0, rtol=0, equal_nan=True)  # infinities and NaNs that agree
    worst: np.ndarray = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    return np.ravel(worst)


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


# Answers against answers: what went over the wire is JSON on both sides.

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def compare_answers(
    wanted: Sequence[Any], found: Sequence[Any], atol: float, rtol: float, *, golden: bool, start: int = 0
) -> list[Replayed]:
    """Compare answers value by value.

    Args:
        wanted: Recorded answers, or those of the model loaded here; JSON.
        found: The server's, one each; JSON.
        atol: Absolute tolerance of floating point numbers. Whole numbers, truth values and texts must be equal.
        rtol: Relative tolerance.
        golden: Whether the rows were recorded with the model; otherwise they are the user's.
        start: Index of the first row.
    """
    name, source = ("row", "recorded") if golden else ("your row", "here")
    rows = []
    for index, (old, new) in enumerate(zip(wanted, found, strict=True), start):
        values = list(_compared(f"{name} {index}", old, new, atol, rtol, source))
        problem = next((value.words for value in values if not value.tolerated), None)
        first = next((value.words for value in values if not value.identical), None)
        identical = all(value.identical for value in values)
        differences = [value.differences for value in values]
        rows.append(_replayed(index, differences, problem, first, identical=identical, golden=golden))
    return rows


@dataclass(frozen=True)
class _Compared:
    """One value of an answer, or one list of numbers; ``words`` say the worst of it."""

    differences: np.ndarray
    identical: bool
    tolerated: bool
    words: str


def _compared(where: str, wanted: Any, found: Any, atol: float, rtol: float, source: str) -> Iterator[_Compared]:
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        for key in wanted:
            yield from _compared(f"{where}, {key}", wanted[key], found[key], atol, rtol, source)
        return
    old, new = _numbers(wanted), _numbers(found)
    if old is not None and new is not None and old.shape == new.shape:
        yield _compared_numbers(where, old, new, atol, rtol, source)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, pair in enumerate(zip(wanted, found, strict=True)):
            yield from _compared(f"{where}[{index}]", *pair, atol, rtol, source)
    else:
        # True == 1 in Python, and they are not the same answer.
        same = type(wanted) is type(found) and wanted == found
        words = f"{where}: {_SHORT.repr(found)}, {source} {_SHORT.repr(wanted)}"
        yield _Compared(np.array([0.0 if same else np.inf]), same, same, words)


def _numbers(value: Any) -> np.ndarray | None:
    """A number or regular lists of them; None for anything else. JSON's null is what pandas makes of a missing NaN."""
    if value is None:
        return np.full((), np.nan)
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return None
    try:
        array: np.ndarray = np.asarray(value)
    except (ValueError, OverflowError):  # ragged
        return None
    if array.dtype.kind not in "iuf" or not array.size:
        return None
    return array


def _compared_numbers(where: str, old: np.ndarray, new: np.ndarray, atol: float, rtol: float, source: str) -> _Compared:
    whole = old.dtype.kind in "iu" and new.dtype.kind in "iu"
    equal = (old == new) | (np.isnan(old) & np.isnan(new))
    # Equal numbers can still be different bits: 0.0 and -0.0. The sign of a NaN says nothing.
    same = equal if whole else equal & ((np.signbit(old) == np.signbit(new)) | np.isnan(old))
    near = equal if whole else np.isclose(new, old, atol=atol, rtol=rtol, equal_nan=True)
    worst = np.argwhere(~near) if not near.all() else np.argwhere(~same)
    words = ""
    if len(worst):
        place = tuple(worst[0])
        index = "".join(f"[{i}]" for i in place)
        words = f"{where}{index}: {new[place].item()!r}, {source} {old[place].item()!r}"
    return _Compared(_differences(old, new), bool(same.all()), bool(near.all()), words)
