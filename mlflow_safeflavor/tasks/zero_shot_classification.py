"""Texts → the candidate labels that fit, as transformers' zero-shot-classification pipeline."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.errors import InputError, StructureError
from mlflow_safeflavor.tasks.candidates import (
    BEST_AND_ALL,
    LABELS,
    TEMPLATE,
    best_first,
    filled,
    require_candidates,
)
from mlflow_safeflavor.tasks.classification import labels_of, read_logits
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.outputs import require_finite, softmax
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text import TextTask
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.text_params import MAX_LENGTH, TRUNCATION

if TYPE_CHECKING:
    import torch

__all__ = ["ZeroShotClassification"]

_MULTI_LABEL = Param("multi_label", "boolean", default=False, wanted="true or false")


class ZeroShotClassification(TextTask):
    """Labels of a text, out of the request's, through a model of natural language inference.

    The model is asked, for each label, whether the text entails "This example is LABEL.".

    Answers: ``label`` and ``score``, the best one, and ``labels`` and ``scores``, all of them, best
    first. Scores add up to 1, unless ``multi_label`` (or a single label) has each judged by itself.
    """

    name = "zero-shot-classification"
    params = (LABELS, TEMPLATE, _MULTI_LABEL, MAX_LENGTH, TRUNCATION)
    golden_params = MappingProxyType({"candidate_labels": ["travel", "science", "food"]})
    answer = BEST_AND_ALL

    @classmethod
    def serves(cls, class_name: str) -> bool:
        # Whether a classifier was made for inference, its class does not tell.
        return False

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {
            **describe_text_model(model),
            "labels": labels_of(model),
            "entailment": _entailment(model),
        }

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # Golden rows are asked with the labels that were saved as default, if there are any.
        own = ("candidate_labels",) if config.get("params", {}).get("candidate_labels") else ()
        return {name: value for name, value in super().golden(config).items() if name not in own}

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        self.require_length("max_length", checked["max_length"], texts=2)
        require_candidates(checked["candidate_labels"], "params, 'candidate_labels'")
        return checked

    # A row → one piece for each label.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        labels, limit = params["candidate_labels"], params["max_length"] or self.limit
        where, instead = (
            "params, 'candidate_labels', for each row",
            "send fewer rows or labels at once",
        )
        self.caps.require_pieces(len(labels) * len(rows), len(rows), where=where, instead=instead)
        hypotheses = self._hypotheses(params)
        for i, row in enumerate(rows):
            self.require_short(i, [row], limit, cut=params["truncation"])
            # Once for all labels, whose hypotheses ``pair`` puts behind it.
            (text,) = self.encoder.encode([row["text"]], truncation=False, special=False)
            pairs = []
            for label, hypothesis in zip(labels, hypotheses, strict=True):
                pair = self.encoder.pair(
                    text, hypothesis, max_length=limit if params["truncation"] else None, only=0
                )
                if limit and params["truncation"] and len(pair["input_ids"]) > limit:
                    raise _too_long(label, limit)
                self.require_fitting(i, len(pair["input_ids"]), limit)
                pairs.append(self.known(pair))
                yield None
            yield {"pairs": pairs}

    def _hypotheses(self, params: Mapping[str, Any]) -> list[dict[str, list[Any]]]:
        """The template with each label, encoded once for all rows."""
        asked = filled(params["hypothesis_template"], params["candidate_labels"], self.caps)
        encoded: list[dict[str, list[Any]]] = self.encoder.encode(
            asked, truncation=False, special=False
        )
        return encoded

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features["pairs"]
        return pieces

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        return read_logits(outputs, len(mask), self.config["labels"])

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        """Logits of shape (candidate labels, labels of the model)."""
        return {"logits": np.stack([output["logits"] for output in outputs])}

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, output in enumerate(outputs, first):
            require_finite([output["logits"]], i)
            yield best_first(params["candidate_labels"], self._scores(output["logits"], params))

    def _scores(self, logits: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
        entailment = self.config["entailment"]
        if params["multi_label"] or len(logits) == 1:
            # Each label by itself, entailment against contradiction; the pipeline takes the other
            # end of the labels for the latter, and leaves "neutral" out.
            contradiction = -1 if entailment == 0 else 0
            by_itself: np.ndarray = softmax(logits[:, [contradiction, entailment]])[:, 1]
            return by_itself
        return softmax(logits[:, entailment])  # of the candidate labels, (candidate labels,)


def _too_long(label: str, limit: int) -> InputError:
    return InputError(
        "A label leaves no room for the text",
        where="params, 'candidate_labels'",
        wanted=f"labels that leave room within {limit} tokens, together with hypothesis_template",
        found=reprlib.repr(label),
        hint="shorten the label or the template: texts are cut, hypotheses are not",
    )


def _entailment(model: torch.nn.Module) -> int:
    """Index of the logit that the hypothesis follows from the text."""
    label2id = dict(getattr(getattr(model, "config", None), "label2id", None) or {})
    found = [int(i) for label, i in label2id.items() if str(label).lower().startswith("entail")]
    if not found or len(label2id) < 2:
        # transformers' pipeline warns and takes the last one, which may mean the opposite.
        raise StructureError(
            "The model does not say which of its labels is entailment",
            where=f"{type(model).__name__}.config.label2id",
            wanted="two labels or more, one of them starting with 'entail'",
            found=repr(label2id),
            hint="set model.config.id2label and label2id to what the model was trained with, "
            "before saving",
        )
    return found[0]
