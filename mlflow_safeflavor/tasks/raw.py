"""Named arrays in, named arrays out: for any module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mlflow_safeflavor.artifact.arrays import array_of, is_tensor
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import InputError, IntegrityError, StructureError
from mlflow_safeflavor.mlflow_compat import inferred_signature, rows_schema
from mlflow_safeflavor.module.failures import is_out_of_memory
from mlflow_safeflavor.tasks.arguments import named_arguments, needed_arguments, takes_any
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.sizes import free_sizes

if TYPE_CHECKING:
    import torch

__all__ = ["Raw"]

_SINGLE = "one array, or a numeric table, for a forward of one argument"


class Raw(Task):
    """The keyword arguments of ``forward`` as numpy arrays, and its output tensors as numpy arrays.

    Nothing is padded, cut or batched: one call is one forward. Floating point arrays are cast to
    the serving dtype; outputs in half precision come back as float32, which numpy knows. A forward
    of one argument also takes the array by itself, or a table whose rows are the array's; a model
    saved with a table as example answers with a table.
    """

    name = "raw"
    fields = ()
    required = ()
    needs_example = True

    def __init__(self, config: Mapping[str, Any], columns: Mapping[str, str | None]) -> None:
        super().__init__(config, columns)
        form, names = config.get("form"), config.get("columns")
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if form not in ("arrays", "array", "table") or listed != (form == "table"):
            raise IntegrityError(
                "The form of the arrays is malformed", where="task_config, form", hint=FETCH_AGAIN
            )

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False

    @classmethod
    def columns_for(
        cls, input_columns: Mapping[str, str | None] | None
    ) -> Mapping[str, str | None]:
        if input_columns:
            raise InputError(
                "The raw task has no columns",
                where="input_columns",
                wanted="None",
                found=dict(input_columns),
            )
        return {}

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        needed = needed_arguments(model)
        # With ``**kwargs`` any name may be right; classes of transformers pass them on.
        return {
            "arguments": None if takes_any(model) else named_arguments(model),
            "single": needed[0] if len(needed) == 1 else None,
        }

    @classmethod
    def describe_example(cls, config: Mapping[str, Any], example: Any) -> dict[str, Any]:
        """The form of the example (``arrays``, ``array`` or ``table``), and its columns."""
        form = "arrays" if isinstance(example, Mapping) else "array"
        columns: list[str] | None = None
        if isinstance(example, pd.DataFrame) and not _are_arguments(example, config["arguments"]):
            form, columns = "table", list(map(str, example.columns))
        return {"form": form, "columns": columns}

    def measured(self, engine: Engine, example: Any) -> dict[str, Any]:
        """Shapes of the arrays, with -1 for sizes that may vary."""
        return {
            "sizes": free_sizes(lambda arrays: self._forward(engine, arrays), self.rows(example)[0])
        }

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        if self.config["form"] == "table":
            return inferred_signature(example, result)
        arrays = self.rows(example)[0]
        sizes = self.config["sizes"]
        named = self.config["form"] == "arrays"
        inputs = Schema(
            [TensorSpec(a.dtype, tuple(sizes[n]), n if named else None) for n, a in arrays.items()]
        )
        return ModelSignature(
            inputs=inputs, outputs=_outputs(result, len(next(iter(arrays.values()))))
        )

    def stored_example(self, example: Any) -> Any:
        arrays = self.rows(example)[0]
        return {"table": example, "array": next(iter(arrays.values()))}.get(
            self.config["form"], dict(arrays)
        )

    def rows(self, data: Any) -> list[Row]:
        if self.config["form"] == "table" and not (isinstance(data, np.ndarray) or is_tensor(data)):
            data = _as_table(data, self.config["columns"])
        if isinstance(data, pd.DataFrame) and _are_arguments(data, self.config["arguments"]):
            data = {str(name): _stacked(str(name), data[name]) for name in data.columns}
        if not isinstance(data, Mapping):
            data = {self._single(data): _numbers(data) if isinstance(data, pd.DataFrame) else data}
        if not data:
            raise InputError(
                "The raw task takes named arrays", wanted="a dict of arrays", found="an empty dict"
            )
        return [{str(name): self._array(str(name), value) for name, value in data.items()}]

    def _single(self, data: Any) -> str:
        name: str | None = self.config["single"]
        if name is None or not (
            isinstance(data, (np.ndarray, pd.DataFrame, list, tuple)) or is_tensor(data)
        ):
            raise InputError(
                "The raw task takes named arrays",
                wanted=f"a dict of arrays; {_SINGLE}",
                found=f"{type(data).__name__}, where forward takes "
                f"{self.config['arguments'] or 'any arguments'}",
            )
        return name

    def _array(self, name: str, value: Any) -> np.ndarray:
        known = self.config["arguments"]
        if known is not None and name not in known:
            raise InputError("forward has no such argument", where=name, wanted=" | ".join(known))
        try:
            # No copy: engines never write to their inputs.
            array: np.ndarray = array_of(value) if is_tensor(value) else np.asarray(value)
        except (ValueError, TypeError) as error:
            raise InputError(
                "Not an array", where=name, wanted="numbers of one shape", found=error
            ) from None
        if array.dtype.kind not in "biuf":  # texts, objects, complex numbers
            raise InputError(
                "Not an array of numbers",
                where=name,
                wanted="numbers or booleans",
                found=array.dtype,
            )
        return array

    def result(self, answers: Sequence[Mapping[str, Any]], data: Any) -> Any:
        if self.config["form"] != "table":
            return dict(answers[0])
        index = data.index if isinstance(data, pd.DataFrame) else None
        return pd.DataFrame(
            {name: _column(name, array) for name, array in answers[0].items()}, index=index
        )

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        yield from rows

    # Batches of one: what of the arrays are rows, only the module knows.
    def cost(self, features: Features) -> int:
        return 1

    def batch_budget(self, max_batch_tokens: int) -> int:
        return 1

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        return [self._forward(engine, features) for features in batch]

    def _forward(self, engine: Engine, features: Features) -> RowOutput:
        try:
            outputs = engine(features)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
            if is_out_of_memory(error):  # no fault of the arrays
                raise
            shapes = {name: f"{value.dtype}{list(value.shape)}" for name, value in features.items()}
            raise InputError(
                "forward refused the arrays", where=shapes, found=str(error) or repr(error)
            ) from error
        if not outputs:
            raise StructureError(
                "forward gave no tensor by name", wanted="a tensor, or a tuple or dict of tensors"
            )
        # Users may write to their answer, and engines may keep a tensor that they return.
        return {
            name: array if array.flags.writeable else array.copy()
            for name, array in outputs.items()
        }

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        yield from map(dict, outputs)

    # Arrays are recorded as features and outputs already; the JSON holds their shapes, for people.

    def to_record(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {name: f"{array.dtype}{list(array.shape)}" for name, array in value.items()}

    def from_record(self, value: Mapping[str, Any], features: Mapping[str, np.ndarray]) -> Row:
        return dict(features)


def _are_arguments(table: pd.DataFrame, arguments: Sequence[str] | None) -> bool:
    """Whether the columns of a table are arguments of forward, with lists or numbers in cells."""
    return arguments is not None and set(map(str, table.columns)) <= set(arguments)


def _stacked(name: str, column: pd.Series) -> np.ndarray:
    try:
        stacked: np.ndarray = np.array([np.asarray(cell) for cell in column.tolist()])
    except ValueError as error:
        raise InputError(
            "Cells of a column have different shapes", where=name, wanted="one shape", found=error
        ) from None
    return stacked


def _as_table(data: Any, columns: Sequence[str]) -> pd.DataFrame:
    """The columns of the example, in its order."""
    try:
        table = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
    except (ValueError, TypeError) as error:
        raise InputError(
            "Not a table", wanted=f"columns {', '.join(columns)}", found=error
        ) from None
    if list(table.columns) == list(range(len(columns))):  # a list of lists, which pandas numbers
        table.columns = pd.Index(columns)
    there = [str(name) for name in table.columns]
    # Both, since a column that comes twice is one of the set.
    if set(there) != set(columns) or len(there) != len(columns):
        raise InputError(
            "The columns of the table are not those of the example",
            wanted=", ".join(columns),
            found=", ".join(there),
            hint="rename or select the columns first, as in data[[…]]",
        )
    ordered: pd.DataFrame = table.set_axis(there, axis=1)[list(columns)]
    return ordered


def _numbers(table: pd.DataFrame) -> np.ndarray:
    """A table as float64, which forward gets in the serving dtype; shape (rows, columns)."""
    for name, column in table.items():
        if column.dtype.kind not in "biuf":
            raise InputError(
                "Not a column of numbers",
                where=f"column {name!r}",
                wanted="numbers",
                found=column.dtype,
            )
    numbers: np.ndarray = table.to_numpy(dtype=np.float64)
    return numbers


def _column(name: str, array: np.ndarray) -> list[Any]:
    """Cells of a column: numbers of an output of shape (rows,) or (rows, 1), else nested lists."""
    if not array.ndim:
        raise StructureError(
            "A table cannot hold an output that is not one a row",
            where=name,
            found="a single number",
            hint="save the model with a dict of arrays as input_example",
        )
    cells: list[Any] = (array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array).tolist()
    return cells


def _outputs(result: Mapping[str, np.ndarray] | None, rows: int) -> Schema | None:
    if result is None:
        return None
    if all(array.ndim and len(array) == rows for array in result.values()):
        return rows_schema(result)
    return Schema(
        [TensorSpec(array.dtype, (-1,) * array.ndim, name) for name, array in result.items()]
    )
