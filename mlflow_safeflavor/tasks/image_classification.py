"""Images → labels with scores, as transformers' image-classification pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.tasks.arguments import arguments_of
from mlflow_safeflavor.tasks.classification import describe_labels
from mlflow_safeflavor.tasks.image import ImageTask
from mlflow_safeflavor.tasks.processed import ProcessedClassifier

if TYPE_CHECKING:
    import torch

__all__ = ["ImageClassification"]


class ImageClassification(ImageTask, ProcessedClassifier):
    """Labels of an image.

    Answers: see ``rank_labels``.
    """

    name = "image-classification"

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return "ForImageClassification" in class_name

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {**describe_labels(model), "arguments": arguments_of(model)}
