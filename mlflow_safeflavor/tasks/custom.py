"""Any rows, through the user's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import InputError, IntegrityError
from mlflow_safeflavor.mlflow_compat import inferred_signature
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.cells import from_json, plain, sent, to_json
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.hooks import Hooks, failing, halved
from mlflow_safeflavor.tasks.inputs.rows import Row, rows_of
from mlflow_safeflavor.tasks.params import Param, param_of, param_schema
from mlflow_safeflavor.tasks.row_outputs import by_row

if TYPE_CHECKING:
    import torch

__all__ = ["Custom"]

_BATCH_ROWS = 32


class Custom(Task):
    """Rows of any columns, through two hooks, each called once for all rows of a request.

    ``preprocess(rows, tokenizer)`` takes a list of dicts, by column name, and gives the keyword
    arguments of ``forward``: a dict of numpy arrays, or of tensors, which become arrays; floating
    point numbers reach ``forward`` in the serving dtype. Those whose first dimension is the rows
    are cut into batches of ``batch_rows``; the others go along with each batch.
    ``postprocess(outputs, rows)`` takes the dict of output arrays, with the rows of the request as
    first dimension and halves as float32, and the same rows, and gives one dict a row, or a
    DataFrame. A hook with an argument ``params`` gets the params of the request, one with
    ``processor`` the processor that was saved. Both may be called from many threads.

    Cells may be None, NaN, bytes, arrays, numpy values, dates and decimals. Answers may hold the
    same; arrays and tensors in them become lists.

    What ``preprocess`` raises is an ``InputError`` (400 over HTTP), what ``forward`` and
    ``postprocess`` raise an ``AnswerError`` (500); both name the row. An ``InputError`` that a hook
    raises itself stays as it is.
    """

    name = "custom"
    fields = ()
    required = ()
    reads = ("hooks", "tokenizer", "any_processor")
    reads_files = True
    needs_example = True
    task_options = frozenset({"batch_rows"})

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: Mapping[str, str | None],
        *,
        hooks: Mapping[str, Callable[..., Any]],
        tokenizer: Callable[[], Any],
        any_processor: Callable[[], Any],
    ) -> None:
        super().__init__(config, columns)
        self.hooks = Hooks(hooks, tokenizer, any_processor)

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False

    @classmethod
    def columns_for(cls, input_columns: Mapping[str, str | None] | None) -> Mapping[str, str]:
        return {field: column or field for field, column in (input_columns or {}).items()}

    @classmethod
    def columns_of(cls, example: Any) -> dict[str, str]:
        first = (
            example[0]
            if isinstance(example, Sequence) and not isinstance(example, str) and example
            else example
        )
        if not isinstance(first, (pd.DataFrame, Mapping)):
            raise InputError(
                "The columns cannot be told from the example",
                where="input_example",
                wanted="a DataFrame, a dict or a list of dicts",
                found=type(example).__name__,
            )
        return {str(column): str(column) for column in first}

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        rows = options.get("batch_rows", _BATCH_ROWS)
        if type(rows) is not int or rows < 1:
            raise InputError(
                "Not a number of rows",
                where="model_config, batch_rows",
                wanted="≥ 1",
                found=repr(rows),
            )
        return {"batch_rows": rows}

    # Params are those that the user names at save; hooks read them.

    @classmethod
    def declared(cls, config: Mapping[str, Any]) -> tuple[Param, ...]:
        return tuple(param_of(name, value) for name, value in config.get("params", {}).items())

    @classmethod
    def with_params(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **config,
            "params": {name: param_of(name, value).default for name, value in given.items()},
        }

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        return inferred_signature(
            self.stored_example(example), result, param_schema(self.asked) if self.asked else None
        )

    def stored_example(self, example: Any) -> Any:
        rows = [
            {self.columns[field]: value for field, value in row.items()}
            for row in self.rows(example)
        ]
        return pd.DataFrame([{name: sent(value) for name, value in row.items()} for row in rows])

    def rows(self, data: Any) -> list[Row]:
        self.require_few(data)
        # Every column of the example, since hooks rely on them; None and NaN are values to them.
        return rows_of(data, self.columns, missing=True)

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        inputs = self.hooks.preprocessed([self._by_column(row) for row in rows], params)
        # An input without rows (a table, a scale) goes along with each batch. One that happens to
        # be as long as the request is taken for rows: see docs/kept.md.
        rowwise = {
            name: array for name, array in inputs.items() if array.ndim and len(array) == len(rows)
        }
        shared = {name: array for name, array in inputs.items() if name not in rowwise}
        for i in range(len(rows)):
            yield {"inputs": (i, rowwise), "shared": shared}

    def _by_column(self, row: Row) -> dict[str, Any]:
        return {str(self.columns[field]): value for field, value in row.items()}

    def holds(self, features: Features) -> int:
        return 0  # postprocess sees all rows of a request together

    def cost(self, features: Features) -> int:
        return 1

    def batch_budget(self, max_batch_tokens: int) -> int:
        return int(self.config["batch_rows"])

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        # Rows of several requests may share a batch, but not a forward: inputs without rows are
        # those of one request.
        requests: dict[int, list[int]] = {}
        for place_, features in enumerate(batch):
            requests.setdefault(id(features["inputs"][1]), []).append(place_)
        found: dict[int, RowOutput] = {}
        for places in requests.values():
            found.update(
                zip(places, self._forward(engine, [batch[i] for i in places]), strict=True)
            )
        return [found[i] for i in range(len(batch))]

    def _forward(self, engine: Engine, batch: Sequence[Features]) -> list[RowOutput]:
        """One forward over rows of one request."""
        numbers = [features["inputs"][0] for features in batch]
        rowwise = batch[0]["inputs"][1]
        shared = batch[0]["shared"]

        def run(part: slice) -> list[RowOutput]:
            inputs = {name: array[numbers[part]] for name, array in rowwise.items()}
            with failing("forward", numbers[part]):
                return by_row(engine({**inputs, **shared}), len(numbers[part]))

        return halved(run, len(numbers))

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        by_column = [self._by_column(row) for row in rows]
        answers = self.hooks.postprocessed(by_column, outputs, params)
        yield from (
            {str(name): plain(value) for name, value in answer.items()} for answer in answers
        )

    # Golden rows.

    def to_record(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {name: to_json(cell, f"column {name!r}") for name, cell in value.items()}

    @classmethod
    def sent(cls, cell: Any) -> Any:
        return sent(from_json(cell))

    def from_record(self, value: Mapping[str, Any], features: Mapping[str, np.ndarray]) -> Row:
        try:
            return {name: from_json(cell) for name, cell in value.items()}
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise IntegrityError(
                "A golden row is malformed", found=error, hint=FETCH_AGAIN
            ) from None
