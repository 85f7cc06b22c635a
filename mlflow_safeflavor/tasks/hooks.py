"""The user's own two hooks: called, checked, and the row found that one fails over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from mlflow_safeflavor.artifact.arrays import array_of, is_tensor
from mlflow_safeflavor.errors import AnswerError, InputError, SafeFlavorError, StructureError
from mlflow_safeflavor.tasks.features import RowOutput
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.row_outputs import together

__all__ = ["Hooks", "failing", "halved"]

T = TypeVar("T")


class Hooks:
    """``preprocess`` and ``postprocess``, each called once for all rows of a request.

    Args:
        hooks: Both, by name.
        tokenizer: Gives the second argument of ``preprocess``; called each time.
        processor: Gives the argument ``processor`` of a hook that has one; called each time.

    Raises:
        StructureError: One of them is missing.
    """

    def __init__(
        self,
        hooks: Mapping[str, Callable[..., Any]],
        tokenizer: Callable[[], Any],
        processor: Callable[[], Any],
    ) -> None:
        if not {"preprocess", "postprocess"} <= hooks.keys():
            raise StructureError(
                "The custom task needs both hooks",
                wanted="preprocess=… and postprocess=…",
                found=sorted(hooks),
            )
        self.preprocess, self.postprocess = hooks["preprocess"], hooks["postprocess"]
        self._tokenizer, self._processor = tokenizer, processor

    def preprocessed(
        self, rows: Sequence[dict[str, Any]], params: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """The keyword arguments of ``forward``, arrays.

        Raises:
            InputError: ``preprocess`` raised over a row; names it.
            StructureError: It gave something else.
        """

        def run(part: slice) -> dict[str, np.ndarray]:
            with failing("preprocess", range(len(rows))[part]):
                made = self._call(self.preprocess, params, rows[part], self._tokenizer())
            return _arguments(made)

        return halved(run, len(rows))

    def postprocessed(
        self,
        rows: Sequence[dict[str, Any]],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
    ) -> Sequence[Mapping[str, Any]]:
        """Answers, one dict a row.

        Raises:
            AnswerError: ``postprocess`` raised over a row; names it.
            StructureError: It gave something else.
        """

        def run(part: slice) -> Sequence[Mapping[str, Any]]:
            with failing("postprocess", range(len(rows))[part]):
                made = self._call(self.postprocess, params, together(outputs[part]), rows[part])
            return _answers(made, len(rows[part]))

        return halved(run, len(rows))

    def _call(self, hook: Callable[..., Any], params: Mapping[str, Any], *arguments: Any) -> Any:
        """Call a hook, with ``params`` and ``processor`` if it has arguments of these names."""
        named = inspect.signature(hook).parameters
        extra: dict[str, Any] = {"params": dict(params)} if "params" in named else {}
        if "processor" in named:
            extra["processor"] = self._processor()  # made on first use: it imports transformers
        return hook(*arguments, **extra)


def halved(run: Callable[[slice], T], rows: int, first: int = 0) -> T:
    """The result of ``run`` for all rows, or its error for the first row that it fails over.

    Args:
        run: Raises an error with a cause where rows are to blame (see ``failing``).
        rows: Number of rows.
        first: Number of the first one.
    """
    # Hooks and forwards do not say which row it was: halves are asked again, down to a row.
    try:
        return run(slice(first, first + rows))
    except SafeFlavorError as error:
        half = rows // 2
        if half and error.__cause__ is not None:
            halved(run, half, first)
            halved(run, rows - half, first + half)
        raise  # neither half failed by itself: the error of all


@contextmanager
def failing(part: str, rows: Sequence[int]) -> Iterator[None]:
    """Name exceptions of the user's code by part and row, ``sys.exit()`` included."""
    try:
        yield
    except (KeyboardInterrupt, SafeFlavorError):  # Ctrl-C, and errors that a hook names itself
        raise
    except BaseException as error:
        where = (
            format_cell(rows[0])
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


def _arguments(made: Any) -> dict[str, np.ndarray]:
    if not isinstance(made, Mapping) or not all(map(_is_numbers, made.values())):
        raise StructureError(
            "preprocess must give the keyword arguments of forward",
            wanted="a dict of arrays or tensors",
            found=_kinds(made),
        )
    return {
        str(name): array_of(value) if is_tensor(value) else value for name, value in made.items()
    }


def _answers(made: Any, rows: int) -> Sequence[Mapping[str, Any]]:
    if isinstance(made, pd.DataFrame):
        made = [dict(zip(made.columns, row, strict=True)) for row in made.itertuples(index=False)]
    if not _is_one_dict_a_row(made, rows):
        raise StructureError(
            "postprocess must give one dict a row",
            wanted=f"a list of {rows} dicts, or a DataFrame of {rows} rows",
            found=_kinds_of(made),
        )
    return list(made)


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
