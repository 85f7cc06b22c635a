"""Sounds → labels with scores, as transformers' audio-classification pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.tasks.classification import describe_labels
from mlflow_safeflavor.tasks.listening import ListeningTask
from mlflow_safeflavor.tasks.processed import ProcessedClassifier

if TYPE_CHECKING:
    import torch

__all__ = ["AudioClassification"]


class AudioClassification(ListeningTask, ProcessedClassifier):
    """Labels of a sound.

    Some extractors (Whisper, AST) make features of a fixed length and cut off what is behind it, as
    in transformers.

    Answers: see ``rank_labels``.
    """

    name = "audio-classification"

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith(("ForAudioClassification", "ForSequenceClassification"))

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {**describe_labels(model, one_label="softmax"), **cls.describe_listening(model)}
