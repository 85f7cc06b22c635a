"""Texts, or pairs of texts → labels with scores, as ``transformers.pipeline("text-classification")`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.base import Features, Row, RowOutput
from mlflow_safeflavor.tasks.labels import labels_of, sigmoid, softmax
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text import MAX_LENGTH, TRUNCATION, TextTask, describe_text_model, pick, require_finite

__all__ = ["TextClassification"]

_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}
_TOP_K = Param(
    "top_k",
    "long",
    default=1,
    wanted="a whole number of at least 1, or -1 for all labels",
    allows=lambda value: value >= 1 or value == -1,
    none_is=-1,
)
_FUNCTION = Param(
    "function_to_apply",
    "string",
    default="default",
    wanted=" | ".join(("default", *_SCORES)),
    allows=lambda value: value in ("default", *_SCORES),
    none_is="default",
)


class TextClassification(TextTask):
    """Labels of a text, or of a pair of texts where the columns have a ``text_pair``.

    Answers: ``label`` and ``score``, the best one. With ``top_k`` other than 1 also ``labels`` and ``scores``, lists
    of the ``top_k`` best, best first.
    """

    name = "text-classification"
    fields = ("text", "text_pair")
    params = (_TOP_K, _FUNCTION, MAX_LENGTH, TRUNCATION)
    answer = Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")])

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForSequenceClassification")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        if options:
            raise InputError("text-classification has no options", where="model_config", found=sorted(options))
        labels = labels_of(model)
        problem_type = getattr(getattr(model, "config", None), "problem_type", None)
        return {
            **describe_text_model(model),
            "labels": labels,
            "problem_type": problem_type,
            "function_to_apply": _function(problem_type, len(labels)),
        }

    def read(self, outputs: Mapping[str, torch.Tensor], mask: torch.Tensor) -> list[RowOutput]:
        logits = pick(outputs, "logits", (len(mask), len(self.config["labels"])))
        return [{"logits": row} for row in logits.cpu().numpy()]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        logits = np.stack([output["logits"] for output in outputs])
        require_finite(logits)
        function = params["function_to_apply"]
        scores = _SCORES[self.config["function_to_apply"] if function == "default" else function](logits)
        return [self._answer(row, params["top_k"]) for row in scores]

    def _answer(self, scores: np.ndarray, top_k: int) -> dict[str, Any]:
        # Stable, so that of equal scores the first label wins, as in transformers.
        order = np.argsort(-scores, kind="stable")
        labels = [self.config["labels"][i] for i in order]
        ranked = scores[order].tolist()
        best = {"label": labels[0], "score": ranked[0]}
        if top_k == 1:
            return best
        kept = len(labels) if top_k == -1 else top_k
        return {**best, "labels": labels[:kept], "scores": ranked[:kept]}


def _function(problem_type: str | None, num_labels: int) -> str:
    """What turns logits into scores, by the rules of transformers' pipeline."""
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or num_labels == 1 else "softmax"
