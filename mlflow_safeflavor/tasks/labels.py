"""What classifiers share: the names of their labels, and logits → scores."""

from __future__ import annotations

import numpy as np
import torch

from mlflow_safeflavor.errors import StructureError

__all__ = ["labels_of", "sigmoid", "softmax"]


def labels_of(model: torch.nn.Module) -> list[str]:
    """Labels in the order of the logits.

    Raises:
        StructureError: The model's config does not name one for each.
    """
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = {int(i): str(label) for i, label in dict(id2label).items()}
    if not labels or sorted(labels) != list(range(len(labels))):
        raise StructureError(
            "The model does not name its labels",
            where=f"{type(model).__name__}.config.id2label",
            wanted="a dict with the keys 0, 1, 2, … one for each logit",
            found=repr(id2label),
            way_out="set model.config.id2label before saving",
        )
    return [labels[i] for i in range(len(labels))]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Scores that add up to 1 along the last axis; any shape, float32 stays float32."""
    shifted: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return scores


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """A score for each logit by itself; any shape, float32 stays float32."""
    # Two branches of the same function: exp of a large positive number would overflow.
    small = np.exp(-np.abs(logits))
    scores: np.ndarray = np.where(logits >= 0, 1, small) / (1 + small)
    return scores
