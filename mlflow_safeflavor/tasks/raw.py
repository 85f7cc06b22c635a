"""A dict of named arrays in, a dict of named arrays out: for any module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mlflow_safeflavor.engine import Engine
from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput, Task
from mlflow_safeflavor.tasks.outputs import own_array

__all__ = ["Raw"]


class Raw(Task):
    """The keyword arguments of ``forward`` as numpy arrays, and its output tensors as numpy arrays.

    Nothing is padded, cut or batched: one call is one forward. Floating point arrays are cast to the
    serving dtype; outputs in half precision come back as float32, which numpy knows.
    """

    name = "raw"
    fields = ()
    required = ()
    needs_example = True

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False

    @classmethod
    def columns_for(cls, input_columns: Mapping[str, str] | None) -> dict[str, str]:
        if input_columns:
            raise InputError(
                "The raw task has no columns", where="input_columns", wanted="None", found=dict(input_columns)
            )
        return {}

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return {"arguments": None}
        return {"arguments": [p.name for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]}

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        return ModelSignature(inputs=_tensor_specs(example), outputs=_tensor_specs(result))

    def rows(self, data: Any) -> list[Row]:
        if not isinstance(data, Mapping) or not data:
            raise InputError("The raw task takes named arrays", wanted="a dict of arrays", found=type(data).__name__)
        return [{str(name): self._array(str(name), value) for name, value in data.items()}]

    def _array(self, name: str, value: Any) -> np.ndarray:
        known = self.config["arguments"]
        if known is not None and name not in known:
            raise InputError("forward has no such argument", where=name, wanted=" | ".join(known))
        try:
            array = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
        except (ValueError, TypeError) as error:
            raise InputError("Not an array", where=name, wanted="numbers of one shape", found=error) from None
        if array.dtype.kind not in "biuf":
            raise InputError("Not an array of numbers", where=name, wanted="numbers or booleans", found=array.dtype)
        return array

    def result(self, answers: Sequence[Mapping[str, Any]], data: Any) -> Any:
        return dict(answers[0])

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        yield from rows

    def cost(self, features: Features) -> int:
        return 1

    def batch_budget(self, max_batch_tokens: int) -> int:
        return 1

    def forward(self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]) -> list[RowOutput]:
        return [self._forward(engine, features) for features in batch]

    def _forward(self, engine: Engine, features: Features) -> RowOutput:
        inputs = {name: torch.tensor(value) for name, value in features.items()}  # a copy: the caller's stay theirs
        inputs = {name: t.to(engine.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        try:
            outputs = engine(inputs)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
            shapes = {name: f"{value.dtype}{list(value.shape)}" for name, value in features.items()}
            raise InputError("forward refused the arrays", where=shapes, found=str(error) or repr(error)) from error
        if not outputs:
            raise StructureError("forward gave no tensor by name", wanted="a tensor, or a tuple or dict of tensors")
        return {name: own_array(tensor) for name, tensor in outputs.items()}

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

    # Arrays are recorded as features and outputs already; the JSON holds their shapes, to be read by people.

    def to_record(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {name: f"{array.dtype}{list(array.shape)}" for name, array in value.items()}

    def from_record(self, value: Mapping[str, Any], features: Mapping[str, np.ndarray]) -> Row:
        return dict(features)


def _tensor_specs(arrays: Mapping[str, Any]) -> Schema:
    """Any size in every dimension: the example's sizes are an example."""
    specs = {name: np.asarray(value) for name, value in arrays.items()}
    return Schema([TensorSpec(array.dtype, (-1,) * array.ndim, name) for name, array in specs.items()])
