"""Tasks of images and sounds: a processor makes arrays, those of one shape run together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.machine import give_back
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.classification import (
    FUNCTION,
    LABEL_AND_SCORE,
    TOP_K,
    rank_labels,
    read_logits,
    require_labels,
)
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.processor import apply
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.params import param_schema

__all__ = ["ProcessedClassifier", "ProcessedTask"]

# Pixels or samples of a cell from which on freed memory is given back to the system at once.
_LARGE = 4_000_000


class ProcessedTask(Task):
    """Answers to a file in a column, which a processor of transformers turns into arrays.

    That column has MLflow's type binary. That takes base64 text over HTTP; in one process MLflow
    lets every other form of a cell pass, too.

    Args:
        config: See ``Task``.
        columns: See ``Task``.
        processor: From ``inputs.processor.load_processor``.
    """

    reads: ClassVar[tuple[str, ...]] = ("processor",)
    reads_files = True
    records_features = False  # too large: pixels and spectrograms
    # The one that holds the file.
    field: ClassVar[str]
    # The outputs part of the signature.
    answer: ClassVar[Schema | None]
    # Arrays of a processor that are left out where the model does not take them.
    spare: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, config: Mapping[str, Any], columns: Mapping[str, str | None], processor: Any
    ) -> None:
        super().__init__(config, columns)
        self.processor = processor

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        inputs = Schema([ColSpec(DataType.binary, self.columns[self.field])])
        return ModelSignature(inputs=inputs, outputs=self.answer, params=param_schema(self.asked))

    @abstractmethod
    def read(self, value: Any, where: str) -> Any:
        """The processor's input, from a cell. Raises ``InputError`` naming ``where``."""

    @abstractmethod
    def record(self, value: Any, where: str) -> str:
        """A cell as base64 text of a file, from which ``read`` reads the same."""

    def beside(self, readable: Any) -> dict[str, np.ndarray]:
        """Features of what ``read`` returned, beside the processor's."""
        return {}

    def rows(self, data: Any) -> list[Row]:
        return super().rows([data] if isinstance(data, (bytes, bytearray)) else data)

    @property
    def folds(self) -> bool:
        return True

    def to_record(self, value: Mapping[str, Any]) -> dict[str, Any]:
        where = self.columns[self.field] or self.field
        return {
            **value,
            **({self.field: self.record(value[self.field], where)} if self.field in value else {}),
        }

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        for i, row in enumerate(rows):
            yield self._features(row[self.field], format_cell(i, self.columns[self.field]))

    def _features(self, value: Any, where: str) -> Features:
        readable = self.read(value, where)
        size = int(np.prod(getattr(readable, "size", 0)))
        made = self.features(readable, where)
        del readable
        # glibc keeps freed memory: a server would stay as large as its largest images.
        if size > _LARGE:
            give_back()
        return made

    def holds(self, features: Features) -> int:
        return sum(array.nbytes for array in features.values())

    def features(self, readable: Any, where: str) -> Features:
        """Features that the processor makes of an image or sound from ``read``.

        Raises:
            InputError: The processor refuses it; names ``where``.
            StructureError: The model takes no such argument.
        """
        try:
            made = apply(self.processor, readable)
        except Exception as error:  # each processor has its own ways to fail
            raise InputError(
                "The processor refuses a value",
                where=where,
                found=f"{type(error).__name__}: {error}",
            ) from error
        takes = self.config["arguments"]
        if takes is not None:
            made = {name: made[name] for name in made if name in takes or name not in self.spare}
        if takes is not None and (unknown := made.keys() - set(takes)):
            raise StructureError(
                "The processor does not belong to the model",
                where=type(self.processor).__name__,
                wanted=f"arguments of forward: {', '.join(takes)}",
                found=", ".join(sorted(unknown)),
                hint="pass the processor the model was trained with: processor=…",
            )
        return {**made, **self.beside(readable)}

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        found: dict[int, RowOutput] = {}
        for group in self.groups(batch):
            part = [batch[i] for i in group]
            read = self.outputs_of(engine(self.collate(part)), part, params)
            found.update(zip(group, read, strict=True))
        return [found[i] for i in range(len(batch))]

    @abstractmethod
    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        """One output a row of ``part``, of what the engine gave; params as in ``forward``."""

    def groups(self, batch: Sequence[Features]) -> list[list[int]]:
        """Indices of rows that ``collate`` can put together: those of one shape."""
        # Images of one size, spectrograms of one length: nothing is padded.
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for i, features in enumerate(batch):
            by_shape.setdefault(tuple(array.shape for array in features.values()), []).append(i)
        return list(by_shape.values())

    def collate(self, batch: Sequence[Features]) -> dict[str, np.ndarray]:
        """The model's arguments, with rows as the first dimension."""
        # (rows, channels, height, width), or (rows, samples), (rows, bins, frames)
        return {name: np.stack([features[name] for features in batch]) for name in batch[0]}


class ProcessedClassifier(ProcessedTask):
    """Labels of a file; answers: see ``rank_labels``."""

    params = (TOP_K, FUNCTION)
    answer = LABEL_AND_SCORE

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_labels(self.caps, self.config, rows, params)  # before a file is decoded
        return super().encode(rows, params)

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        return read_logits(outputs, len(part), self.config["labels"])

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        return rank_labels(self.config, outputs, params, first)
