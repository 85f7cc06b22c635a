"""Candidate labels: the params that name them, the texts made of them, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.mlflow_compat import Array, schema_of
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.params import Param

__all__ = ["BEST_AND_ALL", "LABELS", "TEMPLATE", "best_first", "filled", "require_candidates"]

LABELS = Param(
    "candidate_labels",
    "string",
    default=[],
    wanted="a list of labels, none of them empty",
    allows=all,
    many=True,
)
TEMPLATE = Param(
    "hypothesis_template",
    "string",
    default="This example is {}.",
    wanted="a text with {} where the label goes",
    allows=lambda value: "{}" in value,
)
# The outputs part of the signature.
BEST_AND_ALL = schema_of(
    {
        "label": DataType.string,
        "score": DataType.double,
        "labels": Array(DataType.string),
        "scores": Array(DataType.double),
    }
)


def require_candidates(labels: Sequence[str], where: str) -> None:
    """Raise ``InputError`` where there are no labels to choose from."""
    if not labels:
        raise InputError(
            "There are no labels to choose from",
            where=where,
            wanted="at least one label",
            hint="pass params={'candidate_labels': […]}, with the request or when the model "
            "is saved",
        )


def filled(template: str, labels: Sequence[str], caps: Caps) -> list[str]:
    """The template with each label. Raises ``InputError`` where that is too much text."""
    characters = sum(len(template) + template.count("{}") * len(label) for label in labels)
    where, instead = (
        "params, 'hypothesis_template', with each label",
        "shorten it, or name fewer labels",
    )
    caps.require(
        "max_characters", characters, "Hypotheses are too long", where=where, instead=instead
    )
    # Not str.format: "{0.__class__}" reads attributes, and "{:999999999}" fills the memory.
    return [template.replace("{}", label) for label in labels]


def best_first(labels: Sequence[str], scores: np.ndarray) -> dict[str, Any]:
    """The answer of these labels; scores of shape (labels,)."""
    order = np.argsort(-scores, kind="stable")  # of equal scores the first label wins
    best, ranked = [labels[i] for i in order], scores[order].tolist()
    return {"label": best[0], "score": ranked[0], "labels": best, "scores": ranked}
