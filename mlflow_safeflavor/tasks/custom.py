"""Any rows, through the user's own hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature

from mlflow_safeflavor.artifact.arrays import array_of, is_tensor
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import (
    AnswerError,
    InputError,
    IntegrityError,
    SafeFlavorError,
    StructureError,
)
from mlflow_safeflavor.mlflow_compat import inferred_signature
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.cells import from_json, plain, sent, to_json
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row, rows_of
from mlflow_safeflavor.tasks.inputs.wording import place
from mlflow_safeflavor.tasks.params import Param, param_of, param_schema

if TYPE_CHECKING:
    import torch

__all__ = ["Custom"]

_BATCH_ROWS = 32


class _Outputs(dict[str, np.ndarray]):
    """Outputs of forward for the rows of a request.

    Names those that are not one a row when they are asked for.
    """

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
    """Raw outputs of one row, and the shapes of outputs that are none of one row."""

    left_out: Mapping[str, Sequence[int]]


@contextmanager
def _failing(part: str, rows: Sequence[int]) -> Iterator[None]:
    """Whatever the user's code raises, ``sys.exit()`` included, with its name.

    The keyboard stays the keyboard.
    """
    try:
        yield
    except (KeyboardInterrupt, SafeFlavorError):
        raise
    except BaseException as error:
        where = (
            place(rows[0])
            if len(rows) == 1
            else f"rows {rows[0]} to {rows[-1]}, and none of them alone"
        )
        found = f"{type(error).__name__}: {error}"
        if part == "preprocess":
            raise InputError("preprocess refuses a row", where=where, found=found) from error
        raise AnswerError(
            f"{part} failed over a row",
            where=where,
            found=found,
            hint="ask without that row, or mend that function and save the model again; the cause "
            "is chained to this error, and in the log of the server",
        ) from error


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
        if not {"preprocess", "postprocess"} <= hooks.keys():
            raise StructureError(
                "The custom task needs both hooks",
                wanted="preprocess=… and postprocess=…",
                found=sorted(hooks),
            )
        self.preprocess, self.postprocess = hooks["preprocess"], hooks["postprocess"]
        self.tokenizer, self.processor = tokenizer, any_processor

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

    # Params are whatever the user names at save; hooks read them.

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
        # every column of the example: hooks rely on them
        return rows_of(data, self.columns, missing=True)

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        by_column = [self._by_column(row) for row in rows]
        inputs = self._preprocessed(by_column, params, range(len(rows)))
        rowwise = {
            name: array for name, array in inputs.items() if array.ndim and len(array) == len(rows)
        }
        shared = {name: array for name, array in inputs.items() if name not in rowwise}
        for i in range(len(rows)):
            yield {"inputs": (i, rowwise), "shared": shared}

    def _by_column(self, row: Row) -> dict[str, Any]:
        return {str(self.columns[field]): value for field, value in row.items()}

    def _preprocessed(
        self, rows: list[dict[str, Any]], params: Mapping[str, Any], numbers: Sequence[int]
    ) -> dict[str, np.ndarray]:
        try:
            with _failing("preprocess", numbers):
                made = _call(
                    self.preprocess,
                    (rows, self.tokenizer()),
                    params=params,
                    processor=self.processor,
                )
        except SafeFlavorError as error:
            if error.__cause__ is not None:
                half = len(rows) // 2
                if half:  # which row it was shows by asking less
                    self._preprocessed(rows[:half], params, numbers[:half])
                    self._preprocessed(rows[half:], params, numbers[half:])
            raise
        if not isinstance(made, Mapping) or not all(map(_is_numbers, made.values())):
            raise StructureError(
                "preprocess must give the keyword arguments of forward",
                wanted="a dict of arrays or tensors",
                found=_kinds(made),
            )
        return {
            str(name): array_of(value) if is_tensor(value) else value
            for name, value in made.items()
        }

    def holds(self, features: Features) -> int:
        return 0  # postprocess sees all rows of a request together

    def cost(self, features: Features) -> int:
        return 1

    def batch_budget(self, max_batch_tokens: int) -> int:
        return int(self.config["batch_rows"])

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
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
        inputs = {**{name: array[numbers] for name, array in rowwise.items()}, **batch[0]["shared"]}
        try:
            with _failing("forward", numbers):
                outputs = engine(inputs)
        except SafeFlavorError as error:
            half = len(batch) // 2
            if half and error.__cause__ is not None:  # which row it was shows by asking less
                self._forward(engine, batch[:half])
                self._forward(engine, batch[half:])
            raise
        return _by_row(outputs, len(batch))

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        answers = self._postprocessed(
            [self._by_column(row) for row in rows], outputs, params, range(len(rows))
        )
        yield from (
            {str(name): plain(value) for name, value in answer.items()} for answer in answers
        )

    def _postprocessed(
        self,
        rows: list[dict[str, Any]],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        numbers: Sequence[int],
    ) -> Sequence[Mapping[str, Any]]:
        try:
            with _failing("postprocess", numbers):
                together = _together(outputs)
                answers = _call(
                    self.postprocess, (together, rows), params=params, processor=self.processor
                )
        except SafeFlavorError as error:
            half = len(rows) // 2
            if half and error.__cause__ is not None:
                self._postprocessed(rows[:half], outputs[:half], params, numbers[:half])
                self._postprocessed(rows[half:], outputs[half:], params, numbers[half:])
            raise
        if isinstance(answers, pd.DataFrame):
            answers = [
                dict(zip(answers.columns, row, strict=True))
                for row in answers.itertuples(index=False)
            ]
        if not _is_one_dict_a_row(answers, len(rows)):
            raise StructureError(
                "postprocess must give one dict a row",
                wanted=f"a list of {len(rows)} dicts, or a DataFrame of {len(rows)} rows",
                found=_kinds_of(answers),
            )
        return list(answers)

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


def _call(
    hook: Callable[..., Any], arguments: Sequence[Any], *, params: Any, processor: Callable[[], Any]
) -> Any:
    """A hook with what it asks for by name beside its first two arguments."""
    named = inspect.signature(hook).parameters
    extra: dict[str, Any] = {"params": dict(params)} if "params" in named else {}
    if "processor" in named:
        extra["processor"] = processor()
    return hook(*arguments, **extra)


def _is_numbers(value: Any) -> bool:
    return is_tensor(value) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _kinds(inputs: Any) -> str:
    if not isinstance(inputs, Mapping):
        return type(inputs).__name__
    kinds = {
        name: f" of {v.dtype}" if isinstance(v, np.ndarray) else "" for name, v in inputs.items()
    }
    return ", ".join(
        f"{name}: {type(value).__name__}{kinds[name]}" for name, value in inputs.items()
    )


def _kinds_of(answers: Any) -> str:
    if not isinstance(answers, (list, tuple)):
        return type(answers).__name__
    kinds = sorted({type(answer).__name__ for answer in answers})
    return f"a {type(answers).__name__} of {len(answers)}: {', '.join(kinds)}"


def _is_one_dict_a_row(answers: Any, rows: int) -> bool:
    return (
        isinstance(answers, Sequence)
        and len(answers) == rows
        and all(isinstance(a, Mapping) for a in answers)
    )


def _by_row(outputs: Mapping[str, np.ndarray], rows: int) -> list[RowOutput]:
    """Every output whose first dimension is the rows, row by row."""
    rowwise = {name: array for name, array in outputs.items() if array.ndim and len(array) == rows}
    left_out = {name: array.shape for name, array in outputs.items() if name not in rowwise}
    found: list[RowOutput] = []
    for i in range(rows):
        output = _RowOutput({name: array[i] for name, array in rowwise.items()})
        output.left_out = left_out
        found.append(output)
    return found


def _together(outputs: Sequence[RowOutput]) -> _Outputs:
    """The outputs of all rows, as arrays with the rows first.

    A list of arrays where their shapes differ.

    One that happened to be as long as its batch, and not as the next, is none of one row.
    """
    left_out: dict[str, Sequence[int]] = {}
    for output in outputs:
        left_out |= getattr(output, "left_out", {})
    found: dict[str, Any] = {}
    for name in outputs[0].keys() - left_out.keys():
        arrays = [output[name] for output in outputs]
        same = len({array.shape for array in arrays}) == 1
        found[name] = np.stack(arrays) if same else [array.copy() for array in arrays]
    return _Outputs(found, left_out)
