"""Golden rows, answered again whenever a model is loaded.

A replay is the proof that matters to a user, and it warms the model up on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.errors import ParityError
from mlflow_safeflavor.module.random_state import kept_random_state
from mlflow_safeflavor.predict.differences import differences_of, differing_arrays, differing_values
from mlflow_safeflavor.predict.golden import TOLERANCES, Golden, Predictor, features_of, read_golden
from mlflow_safeflavor.predict.parity import ParityReport, replayed_row
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.inputs.rows import Row

__all__ = ["replay", "require_parity"]


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
    # In another dtype than the recorded one, the coarser of both tolerances holds.
    answers, least = golden.answers, TOLERANCES.get(dtype, {"atol": 0.0, "rtol": 0.0})
    atol, rtol = max(golden.atol, least["atol"]), max(golden.rtol, least["rtol"])
    rows = [
        model.task.from_record(row, golden.inputs(index)) for index, row in enumerate(golden.rows)
    ]
    features = features_of(model, rows)
    # A forward or a hook may draw random numbers: a load must not change the caller's.
    with kept_random_state():
        found, outputs = model.answer(rows, model.task.golden(model.task.config))
    replayed = []
    said: list[Any] = []
    for index in range(len(rows)):
        # Where the model chose another token at a near tie, what it said next is no longer an
        # answer to the same.
        parts = model.task.comparable(golden.outputs(index), outputs[index])
        wanted, got = parts or (golden.outputs(index), outputs[index])
        answered = () if parts else (answers[index], model.task.to_record(found[index]))
        # No tolerance for features: a text that is cut into other tokens can still come near.
        problems = [
            *differing_arrays(index, "input", features[index], golden.inputs(index), 0.0, 0.0),
            *differing_arrays(index, "output", got, wanted, atol, rtol),
        ]
        differing = (
            list(differing_values(f"row {index}", *answered, atol, rtol)) if answered else []
        )
        if differing and not problems:
            # Two labels may be so near that rounding orders them. What the recorded outputs say
            # here is then the test.
            said = said or _said_by_outputs(model.task.uncapped, rows, golden)
            differing = list(
                differing_values(f"row {index}", answers[index], said[index], atol, rtol)
            )
        problems += differing
        differences = [differences_of(wanted.get(name), value) for name, value in got.items()]
        inexact = list(differing_arrays(index, "output", got, wanted, 0.0, 0.0))
        first = next(iter([*inexact, *problems]), None)
        problem = problems[0] if problems else None
        replayed.append(replayed_row(index, differences, problem, first, identical=not inexact))
    return ParityReport(tuple(replayed), atol, rtol)


def _said_by_outputs(task: Task, rows: Sequence[Row], golden: Golden) -> list[Any]:
    """Answers made here of the recorded outputs, as JSON."""
    params = task.check_params(task.golden(task.config))
    outputs = [golden.outputs(index) for index in range(len(rows))]
    with kept_random_state():
        answers = task.decoded(rows, task.encoded(rows, params), outputs, params)
    return [task.to_record(answer) for answer in answers]


def require_parity(report: ParityReport, layout: Layout, engine: str) -> None:
    """Refuse a model that answers its golden rows differently now.

    Raises:
        ParityError: A row is beyond tolerance.
    """
    wrong = [row for row in report.rows if row.problem]
    if wrong:
        raise ParityError(
            "The model answers recorded rows differently from when it was saved",
            where=f"{layout.name_of(layout.recorded(engine)[0])}, {len(wrong)} of "
            f"{len(report.rows)} rows",
            wanted=f"within atol {report.atol:g}, rtol {report.rtol:g}",
            found=wrong[0].problem,
            hint="save the model again in this environment",
        )
