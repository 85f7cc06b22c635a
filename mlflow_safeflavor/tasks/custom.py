"""Any rows, through the user's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature

from mlflow_safeflavor.engine import Engine
from mlflow_safeflavor.errors import AnswerError, InputError, SafeFlavorError, StructureError
from mlflow_safeflavor.releases import inferred_signature
from mlflow_safeflavor.rows import place, rows_of
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput, Task
from mlflow_safeflavor.tasks.outputs import own, own_array

__all__ = ["Custom"]

_BATCH_ROWS = 32
_BYTES = 16_000
"""What a row is taken to hold: nobody knows what the model makes of it."""


class _Answered(dict[str, np.ndarray]):
    """Raw outputs of one row, with the answer that ``postprocess`` made of its batch."""

    answer: dict[str, Any]


class _Failed(Exception):
    """What the user's code raised, and which part of it."""

    def __init__(self, part: str, error: BaseException) -> None:
        super().__init__(part)
        self.part, self.error = part, error


@contextmanager
def _failing(part: str) -> Iterator[None]:
    """Whatever the user's code raises, ``sys.exit()`` included, as ``_Failed``; the keyboard stays the keyboard."""
    try:
        yield
    except (KeyboardInterrupt, SafeFlavorError):
        raise
    except BaseException as error:
        raise _Failed(part, error) from error


def _named(failure: _Failed, batch: Sequence[Features]) -> SafeFlavorError:
    first, last = batch[0]["number"], batch[-1]["number"]
    rows = place(first) if len(batch) == 1 else f"rows {first} to {last}, and none of them alone"
    found = f"{type(failure.error).__name__}: {failure.error}"
    if failure.part == "preprocess":
        return InputError("preprocess refuses a row", where=rows, found=found)
    return AnswerError(
        f"{failure.part} failed over a row",
        where=rows,
        found=found,
        way_out="the cause is chained to this error, and in the log of the server",
    )


class Custom(Task):
    """Rows of any columns, through two hooks.

    ``preprocess(rows, tokenizer)`` takes a list of dicts, by column name, and gives the keyword
    arguments of ``forward``: a dict of tensors whose first dimension is the rows.
    ``postprocess(outputs, rows)`` takes the dict of output tensors and the same rows, and gives one
    dict a row, JSON-able. Both see whole batches, and may be called from many threads.

    What ``preprocess`` raises is an ``InputError`` (400 over HTTP), what ``forward`` and ``postprocess`` raise an
    ``AnswerError`` (500); both name the row. An ``InputError`` that a hook raises itself stays as it is.
    """

    name = "custom"
    fields = ()
    required = ()
    reads = ("hooks", "tokenizer")
    reads_files = True
    needs_example = True
    task_options = frozenset({"batch_rows"})

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: Mapping[str, str],
        *,
        hooks: Mapping[str, Callable[..., Any]],
        tokenizer: Callable[[], Any],
    ) -> None:
        super().__init__(config, columns)
        if not {"preprocess", "postprocess"} <= hooks.keys():
            raise StructureError(
                "The custom task needs both hooks", wanted="preprocess=… and postprocess=…", found=sorted(hooks)
            )
        self.preprocess, self.postprocess = hooks["preprocess"], hooks["postprocess"]
        self.tokenizer = tokenizer

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False

    @classmethod
    def columns_for(cls, input_columns: Mapping[str, str] | None) -> dict[str, str]:
        return dict(input_columns or {})

    @classmethod
    def columns_of(cls, example: Any) -> dict[str, str]:
        first = example[0] if isinstance(example, Sequence) and not isinstance(example, str) and example else example
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
            raise InputError("Not a number of rows", where="model_config, batch_rows", wanted="≥ 1", found=repr(rows))
        return {"batch_rows": rows}

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        frame = pd.DataFrame(
            [{self.columns[field]: row[field] for field in self.columns} for row in self.rows(example)]
        )
        return inferred_signature(frame, result)

    def rows(self, data: Any) -> list[Row]:
        self.require_few(data)
        return rows_of(data, self.columns)  # every column of the example: hooks rely on them

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        yield from ({"row": row, "number": i} for i, row in enumerate(rows))

    def holds(self, features: Features) -> int:
        return _BYTES

    def cost(self, features: Features) -> int:
        return 1

    def batch_budget(self, max_batch_tokens: int) -> int:
        return int(self.config["batch_rows"])

    def forward(self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]) -> list[RowOutput]:
        try:
            return self._forward(engine, batch)
        except _Failed as failure:
            half = len(batch) // 2
            if half:  # which row it was shows by asking less, at the cost of two batches more at most
                self.forward(engine, batch[:half], params)
                self.forward(engine, batch[half:], params)
            raise _named(failure, batch) from failure.error

    def _forward(self, engine: Engine, batch: Sequence[Features]) -> list[RowOutput]:
        rows = [{self.columns[field]: value for field, value in features["row"].items()} for features in batch]
        with _failing("preprocess"):
            inputs = self.preprocess(rows, self.tokenizer())
        if not isinstance(inputs, Mapping) or not all(isinstance(v, torch.Tensor) for v in inputs.values()):
            raise StructureError(
                "preprocess must give the keyword arguments of forward",
                wanted="a dict of tensors",
                found=_kinds(inputs),
            )
        with _failing("forward"):
            # Copies: a forward may return a weight as it is, and a hook may change what it is given.
            outputs = {name: tensor.detach().to("cpu", copy=True) for name, tensor in engine(inputs).items()}
        with _failing("postprocess"):
            answers = self.postprocess(outputs, rows)
        if not _is_one_dict_a_row(answers, len(rows)):
            raise StructureError(
                "postprocess must give one dict a row",
                wanted=f"a list of {len(rows)} dicts",
                found=_kinds_of(answers),
            )
        return [_answered(outputs, i, len(rows), own(dict(answer))) for i, answer in enumerate(answers)]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        yield from (output.answer for output in outputs if isinstance(output, _Answered))


def _kinds(inputs: Any) -> str:
    if not isinstance(inputs, Mapping):
        return type(inputs).__name__
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in inputs.items())


def _kinds_of(answers: Any) -> str:
    if not isinstance(answers, (list, tuple)):
        return type(answers).__name__
    kinds = sorted({type(answer).__name__ for answer in answers})
    return f"a {type(answers).__name__} of {len(answers)}: {', '.join(kinds)}"


def _is_one_dict_a_row(answers: Any, rows: int) -> bool:
    return isinstance(answers, Sequence) and len(answers) == rows and all(isinstance(a, Mapping) for a in answers)


def _answered(outputs: Mapping[str, torch.Tensor], i: int, rows: int, answer: dict[str, Any]) -> _Answered:
    """Row ``i`` of every output whose first dimension is the rows; the rest says nothing of one row."""
    arrays = {
        name: own_array(tensor[i]) for name, tensor in outputs.items() if tensor.dim() and tensor.shape[0] == rows
    }
    answered = _Answered(arrays)
    answered.answer = answer
    return answered
