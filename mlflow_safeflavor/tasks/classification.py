"""Labels and scores, for classifiers of texts, images and sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.features import RowOutput
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.outputs import pick, require_finite, sigmoid, softmax
from mlflow_safeflavor.tasks.params import Param

if TYPE_CHECKING:
    import torch

__all__ = [
    "FUNCTION",
    "LABEL_AND_SCORE",
    "TOP_K",
    "describe_labels",
    "labels_of",
    "rank_labels",
    "read_logits",
    "require_labels",
    "scores_of",
]

# Rows whose scores are computed at a time: others take turns in between.
_TOGETHER = 64

_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}

TOP_K = Param(
    "top_k",
    "long",
    default=1,
    wanted="a whole number of at least 1, or -1 for all labels",
    allows=lambda value: value >= 1 or value == -1,
    none_is=-1,
)
FUNCTION = Param(
    "function_to_apply",
    "string",
    default="default",
    wanted=" | ".join(("default", *_FUNCTIONS)),
    allows=lambda value: value in ("default", *_FUNCTIONS),
    none_is="default",
)
# The outputs part of the signature.
LABEL_AND_SCORE = Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")])


def labels_of(model: torch.nn.Module) -> list[str]:
    """Labels in the order of the logits.

    Raises:
        StructureError: The model's config does not name one for each.
    """
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = {int(i): str(label) for i, label in dict(id2label).items()}  # JSON's keys are texts
    # Every logit needs a name: with gaps, answers would have the names of other labels.
    if not labels or sorted(labels) != list(range(len(labels))):
        raise StructureError(
            "The model does not name its labels",
            where=f"{type(model).__name__}.config.id2label",
            wanted="a dict with the keys 0, 1, 2, … one for each logit",
            found=repr(id2label),
            hint="set model.config.id2label before saving",
        )
    return [labels[i] for i in range(len(labels))]


def read_logits(
    outputs: Mapping[str, np.ndarray], rows: int, labels: Sequence[str]
) -> list[RowOutput]:
    """``logits`` of each row, shape (labels,); ``StructureError`` for any other output."""
    return [{"logits": row} for row in pick(outputs, "logits", (rows, len(labels)))]


def describe_labels(model: torch.nn.Module, *, one_label: str = "sigmoid") -> dict[str, Any]:
    """Facts of a model for ``rank_labels``; JSON only.

    Args:
        model: A classifier.
        one_label: Function from a single logit to a score, where the config names none.
            transformers' pipelines disagree on it: texts and images have "sigmoid", sounds
            "softmax".

    Returns:
        ``labels`` in the order of the logits, ``problem_type`` and ``function_to_apply``.

    Raises:
        StructureError: The model does not name its labels.
    """
    labels = labels_of(model)
    problem_type = getattr(model.config, "problem_type", None)
    said = {"regression": "none", "multi_label_classification": "sigmoid"}.get(str(problem_type))
    function = said or ("softmax" if len(labels) > 1 else one_label)
    return {"labels": labels, "problem_type": problem_type, "function_to_apply": function}


def require_labels(
    caps: Caps, config: Mapping[str, Any], rows: Sequence[Row], params: Mapping[str, Any]
) -> None:
    """Raise ``InputError`` for more labels than a cap allows; the first of each row is free."""
    labels, top_k = len(config["labels"]), params["top_k"]
    kept = labels if top_k == -1 else min(labels, top_k)  # -1 for all
    if kept > 1:
        instead = "ask for fewer labels of fewer rows at once"
        caps.require_answers(kept * len(rows), len(rows), where="params, 'top_k'", instead=instead)


def rank_labels(
    config: Mapping[str, Any],
    outputs: Sequence[RowOutput],
    params: Mapping[str, Any],
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Logits → answers, one a row.

    Args:
        config: With what ``describe_labels`` returned.
        outputs: One a row, with ``logits`` of shape (labels,).
        params: With ``TOP_K`` and ``FUNCTION``.
        first: Number of the first row, for messages.

    Yields:
        ``label`` and ``score``, the best one. With ``top_k`` other than 1 also ``labels`` and
        ``scores``, lists of the ``top_k`` best, best first.

    Raises:
        InputError: A logit is not a number; names the row.
    """
    for start in range(0, len(outputs), _TOGETHER):
        # (rows, labels)
        logits = np.stack([output["logits"] for output in outputs[start : start + _TOGETHER]])
        require_finite(logits, first + start)
        for row in scores_of(config, logits, params):
            yield _answer(config["labels"], row, params["top_k"])


def scores_of(
    config: Mapping[str, Any], logits: np.ndarray, params: Mapping[str, Any]
) -> np.ndarray:
    """Logits of shape (rows, labels) → scores by the function of ``FUNCTION``, or the model's."""
    asked = params["function_to_apply"]
    return _FUNCTIONS[config["function_to_apply"] if asked == "default" else asked](logits)


def _answer(names: Sequence[str], scores: np.ndarray, top_k: int) -> dict[str, Any]:
    # Of equal scores the first label wins, as in transformers.
    first = int(scores.argmax())
    best = {"label": names[first], "score": scores[first].item()}
    if top_k == 1:
        return best
    kept = np.argsort(-scores, kind="stable")[: len(names) if top_k == -1 else top_k]
    return {**best, "labels": [names[i] for i in kept], "scores": scores[kept].tolist()}
