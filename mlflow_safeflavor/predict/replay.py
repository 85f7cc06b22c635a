"""Golden rows, answered again whenever a model is loaded.

A replay is the proof that matters to a user, and it warms the model up on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlflow_safeflavor.errors import ParityError
from mlflow_safeflavor.module.random_state import kept_random_state
from mlflow_safeflavor.predict.comparison import Compared, compared, compared_arrays
from mlflow_safeflavor.predict.golden import TOLERANCES, Golden, answers_of, features_of
from mlflow_safeflavor.predict.model import LoadedModel
from mlflow_safeflavor.predict.parity import ParityReport, replayed_row
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["replay", "require_parity"]


def replay(model: LoadedModel, golden: Golden, dtype: str = "") -> ParityReport:
    """Answer the recorded rows again and compare.

    Args:
        model: What answers.
        golden: What was recorded.
        dtype: What it computes in, if other than what it was saved in.
    """
    # In another dtype than the recorded one, the coarser of both tolerances holds.
    least = TOLERANCES.get(dtype, {"atol": 0.0, "rtol": 0.0})
    atol, rtol = max(golden.atol, least["atol"]), max(golden.rtol, least["rtol"])
    rows = [
        model.task.from_record(row, golden.inputs(index)) for index, row in enumerate(golden.rows)
    ]
    features = features_of(model, rows)
    # A forward or a hook may draw random numbers: a load must not change the caller's.
    with kept_random_state():
        found, outputs = answers_of(model, rows)
    replayed = []
    said: list[Any] = []
    for index in range(len(rows)):
        # Where the model chose another token at a near tie, what it said next is no longer an
        # answer to the same.
        parts = model.task.comparable(golden.outputs(index), outputs[index])
        wanted, got = parts or (golden.outputs(index), outputs[index])
        # No tolerance for features: a text that is cut into other tokens can still come near.
        inputs = compared_arrays(f"row {index}, input", golden.inputs(index), features[index], 0, 0)
        raw = list(compared_arrays(f"row {index}, output", wanted, got, atol, rtol))
        problems = _beyond([*inputs, *raw])
        if not parts:
            where, answer = f"row {index}", model.task.to_record(found[index])
            differing = _beyond(compared(where, golden.answers[index], answer, atol, rtol))
            if differing and not problems:
                # Two labels may be so near that rounding orders them. What the recorded outputs say
                # here is then the test.
                said = said or _said_by_outputs(model.task.uncapped, rows, golden)
                differing = _beyond(compared(where, golden.answers[index], said[index], atol, rtol))
            problems += differing
        inexact = [value.words for value in raw if not value.identical]
        first = next(iter([*inexact, *problems]), None)
        problem = problems[0] if problems else None
        differences = [value.differences for value in raw]
        replayed.append(replayed_row(index, differences, problem, first, identical=not inexact))
    return ParityReport(tuple(replayed), atol, rtol)


def _beyond(values: Iterable[Compared]) -> list[str]:
    """Words for the values that are beyond tolerance."""
    return [value.words for value in values if not value.tolerated]


def _said_by_outputs(task: Task, rows: Sequence[Row], golden: Golden) -> list[Any]:
    """Answers made here of the recorded outputs, as JSON."""
    params = task.check_params(task.golden(task.config))
    outputs = [golden.outputs(index) for index in range(len(rows))]
    with kept_random_state():
        answers = task.decoded(rows, task.encoded(rows, params), outputs, params)
    return [task.to_record(answer) for answer in answers]


def require_parity(report: ParityReport, where: str) -> None:
    """Refuse a model that answers its golden rows differently now; ``where`` is their file.

    Raises:
        ParityError: A row is beyond tolerance.
    """
    wrong = [row for row in report.rows if row.problem]
    if wrong:
        raise ParityError(
            "The model answers recorded rows differently from when it was saved",
            where=f"{where}, {len(wrong)} of {len(report.rows)} rows",
            wanted=f"within atol {report.atol:g}, rtol {report.rtol:g}",
            found=wrong[0].problem,
            hint="save the model again in this environment",
        )
