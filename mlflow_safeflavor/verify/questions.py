"""Requests to a server and the answers wanted: golden rows, and rows of the user's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.types import Schema

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.errors import IntegrityError
from mlflow_safeflavor.load.about_process import arrays_asking, labelled_row
from mlflow_safeflavor.predict.golden import Golden
from mlflow_safeflavor.tasks.raw import Raw
from mlflow_safeflavor.tasks.table import task_class
from mlflow_safeflavor.verify.endpoint import as_served, request_of_arrays, request_of_rows

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["Question", "about_environment", "of_golden", "of_rows"]

# The same rows go together here and there, since the rows of a batch decide how sums are rounded.
_ROWS_PER_REQUEST = 100


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        request: Its body.
        wanted: Answers as JSON, one a row.
        by_row: Whether the server answers with a list, one item a row; otherwise with one answer.
        start: Index of its first row.
        passing: Keys of one answer that are not compared.
    """

    request: Mapping[str, Any]
    wanted: list[Any]
    by_row: bool
    start: int = 0
    passing: Collection[str] = ()

    def lasting(self, answer: Any) -> Any:
        """An answer without what is of the moment."""
        if not self.passing or not isinstance(answer, Mapping):
            return answer
        return {name: value for name, value in answer.items() if name not in self.passing}


def of_golden(golden: Golden, spec: ModelSpec, declared: Collection[str]) -> Iterator[Question]:
    """Golden rows, with what was recorded.

    Args:
        golden: Rows and answers.
        spec: The model.
        declared: Params of its signature: what a request may say.
    """
    if not spec.input_columns:
        raw = Raw(spec.task_config, spec.input_columns)
        for index in range(len(golden.rows)):
            answer = as_served(raw.result([golden.outputs(index)], None))
            request = _of_arrays(golden.inputs(index), spec)
            yield Question(request, [answer], by_row=False, start=index)
        return
    rows, answers = _recorded(golden, spec)
    # MLflow drops params that it does not declare, with a warning in the server's log.
    asked = task_class(spec.task).golden(spec.task_config)
    params = {name: value for name, value in asked.items() if name in declared}
    # All in one request, as they were recorded: the rows of a batch decide how sums are rounded.
    request = request_of_rows(pd.DataFrame(rows, dtype=object))
    request |= {"params": params} if params else {}
    if (cls := task_class(spec.task)).one_answer:
        task = cls(spec.task_config, spec.input_columns)
        question = Question(request, [], by_row=False, passing=cls.passing)
        wanted = question.lasting(as_served(task.result(answers, None)))
        yield replace(question, wanted=[wanted])
    else:
        # As a frame, since that is what tasks return: it gives each column one type.
        yield Question(request, as_served(pd.DataFrame(answers)), by_row=True)


def of_rows(model: LoadedModel, frame: pd.DataFrame, schema: Schema) -> Iterator[Question]:
    """Rows of the user's, with what the model answers here."""
    from mlflow.pyfunc.scoring_server import infer_and_parse_data  # takes a second to import

    form = model.spec.task_config.get("form")
    by_column = bool(model.task.columns) or form == "table"
    by_row = by_column and not model.task.one_answer
    size = _ROWS_PER_REQUEST if by_column else 1
    for start in range(0, len(frame), size):
        part = frame.iloc[start : start + size]
        row = part.iloc[0].to_dict()
        arrays = next(iter(row.values())) if form == "array" else row
        request = request_of_rows(part) if by_column else request_of_arrays(arrays)
        # Read by MLflow's own parser, so that both sides see the same values in the same types.
        wanted = as_served(model.predict(infer_and_parse_data(request, schema)))
        question = Question(request, wanted, by_row, start, model.task.passing)
        yield question if by_row else replace(question, wanted=[question.lasting(wanted)])


def about_environment(golden: Golden, spec: ModelSpec) -> dict[str, Any] | None:
    """The request that asks a server what it runs on; None where there is no room for it."""
    if spec.input_columns:
        row = _recorded(golden, spec)[0][0]
        return labelled_row(list(row), list(row.values()))
    arrays = arrays_asking({name: np.asarray(value) for name, value in golden.inputs(0).items()})
    return None if arrays is None else _of_arrays(arrays, spec)


def _of_arrays(arrays: Mapping[str, np.ndarray], spec: ModelSpec) -> dict[str, Any]:
    """The request in the form of the model's signature: named arrays, one array, or a table."""
    array = next(iter(arrays.values()))
    form, columns = spec.task_config["form"], spec.task_config["columns"]
    if form == "table":
        return request_of_rows(pd.DataFrame(array, columns=columns))
    return request_of_arrays(array if form == "array" else arrays)


def _recorded(golden: Golden, spec: ModelSpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Golden rows by column name, and their answers."""
    try:
        task = task_class(spec.task)
        names = {field: column or field for field, column in spec.input_columns.items()}
        rows = [{names[field]: task.sent(row[field]) for field in names} for row in golden.rows]
        answers = [dict(answer) for answer in golden.answers]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            "The golden rows are not rows of this model",
            where=golden.where,
            wanted=", ".join(spec.input_columns),
            found=repr(error),
            hint=FETCH_AGAIN,
        ) from None
    return rows, answers
