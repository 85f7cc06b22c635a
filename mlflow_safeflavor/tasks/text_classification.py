"""Texts, or pairs of texts → labels with scores, as transformers' text-classification pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.tasks.classification import (
    FUNCTION,
    LABEL_AND_SCORE,
    TOP_K,
    describe_labels,
    rank_labels,
    read_logits,
    require_labels,
)
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

if TYPE_CHECKING:
    import torch

__all__ = ["TextClassification"]


class TextClassification(TextTask):
    """Labels of a text, or of a pair of texts where the columns have a ``text_pair``.

    Answers: see ``rank_labels``.
    """

    name = "text-classification"
    fields = ("text", "text_pair")
    params = (TOP_K, FUNCTION, MAX_LENGTH, TRUNCATION)
    answer = LABEL_AND_SCORE

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForSequenceClassification")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {**describe_text_model(model), **describe_labels(model)}

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_labels(self.caps, self.config, rows, params)  # before a text is tokenised
        return super().encode(rows, params)

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        return read_logits(outputs, len(mask), self.config["labels"])  # (rows, labels)

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
