"""Images → the candidate labels that fit, as transformers' zero-shot-image-classification."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import DataType

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.mlflow_compat import Array, require_schema
from mlflow_safeflavor.tasks.candidates import (
    BEST_AND_ALL,
    LABELS,
    TEMPLATE,
    best_first,
    filled,
    require_candidates,
)
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.image import IMAGE_TOKENS, ImageTask, require_sight
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.wording import format_cell, format_value
from mlflow_safeflavor.tasks.outputs import pick, require_finite, sigmoid, softmax
from mlflow_safeflavor.tasks.text_model import describe_text_model

if TYPE_CHECKING:
    import torch

__all__ = ["ZeroShotImageClassification"]

_TEMPLATE = replace(TEMPLATE, default="This is a photo of {}.")
# SigLIP was trained with texts that are all padded to this length, and without a mask.
_PADDED = 64
# Padded tokens of labels in one forward; it holds their activations at once.
_MOST_TOKENS = 2048
_GOLDEN_LABELS = (["cat", "dog"], ["a red square", "noise", "a photograph", "tree"], ["tree"])


class ZeroShotImageClassification(ImageTask):
    """Labels of an image, out of the request's, by a model that compares images with texts.

    Labels are the param ``candidate_labels``, or those in a cell of the column that
    ``input_columns={"image": …, "candidate_labels": …}`` names; an empty cell takes the param's.

    Answers: ``label`` and ``score``, the best one, and ``labels`` and ``scores``, all of them, best
    first. Scores add up to 1 (CLIP and most), or judge each label by itself (SigLIP).
    """

    name = "zero-shot-image-classification"
    fields = ("image", "candidate_labels")
    params = (LABELS, _TEMPLATE)
    reads = ("encoder", "processor")
    # Neither as many as golden rows nor as rows of a traced forward: torch.export takes equal sizes
    # for one.
    golden_params = MappingProxyType({"candidate_labels": ["travel", "science", "food", "a cat"]})
    answer = BEST_AND_ALL

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return False  # "CLIPModel" is named like any bare model

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {
            "arguments": require_sight(model),
            **describe_text_model(model),
            # As the pipeline tells them apart.
            "siglip": "siglip" in str(getattr(model.config, "model_type", "")),
        }

    @classmethod
    def golden(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        # Golden rows are asked with the labels that were saved as default, if there are any.
        saved = config.get("params", {}).get(LABELS.name)
        return {} if saved else dict(cls.golden_params)

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: Mapping[str, str | None],
        encoder: Any,
        processor: Any,
    ) -> None:
        super().__init__(config, columns, processor)
        self.encoder = encoder

    def signature(self, example: Any = None, result: Any = None) -> ModelSignature:
        signature = super().signature(example, result)
        if LABELS.name in self.columns:
            image, labels = (str(column) for column in self.columns.values())
            signature.inputs = require_schema(
                {image: DataType.binary, labels: Array(DataType.string)}
            )
        return signature

    def golden_rows(self) -> list[Row]:
        rows = super().golden_rows()
        if LABELS.name not in self.columns:
            return rows
        return [
            {**row, LABELS.name: labels} for row, labels in zip(rows, _GOLDEN_LABELS, strict=True)
        ]

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        if LABELS.name not in self.columns:
            require_candidates(checked[LABELS.name], "params, 'candidate_labels'")
        return checked

    @property
    def limit(self) -> int | None:
        """Most tokens of a label that both model and tokenizer take; None if neither says."""
        # The pipeline pads to this length whatever the tokenizer says.
        most = _PADDED if self.config["siglip"] else self.encoder.max_length
        return min((length for length in (self.config["max_length"], most) if length), default=None)

    # A row → one piece for all labels, or several for many.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        labelled = [self._labels(i, row, params) for i, row in enumerate(rows)]
        where, instead = "candidate_labels of all rows", "send fewer rows or labels at once"
        count = sum(map(len, labelled))
        self.caps.require_pieces(count, len(rows), where=where, instead=instead)
        made: dict[tuple[str, ...], list[Features]] = {}
        for i, (row, labels) in enumerate(zip(rows, labelled, strict=True)):
            if labels not in made:  # once for all rows that have them
                made[labels] = list(self._texts(labels, params))
                yield None
            image = self._features(row["image"], format_cell(i, self.columns["image"]))
            yield {"pieces": [{"image": image, **texts} for texts in made[labels]]}

    def _labels(self, i: int, row: Row, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The labels of row ``i``."""
        if LABELS.name not in self.columns:
            return tuple(params[LABELS.name])
        cell, where = row.get(LABELS.name), format_cell(i, self.columns[LABELS.name])
        listed: Any = cell.tolist() if isinstance(cell, np.ndarray) else cell
        texts = isinstance(listed, (list, tuple)) and all(
            isinstance(label, str) and label for label in listed
        )
        if not texts:
            raise InputError(
                "A value is not a list of labels",
                where=where,
                wanted="a list of texts, none of them empty",
                found=format_value(cell),
            )
        labels = tuple(listed) or tuple(params[LABELS.name])
        require_candidates(labels, where)
        return labels

    def _texts(self, labels: Sequence[str], params: Mapping[str, Any]) -> Iterator[Features]:
        """Labels in the template as the model's arguments, so many as one forward takes."""
        texts = filled(params[_TEMPLATE.name], labels, self.caps)
        siglip, limit = self.config["siglip"], self.limit
        for label, text in zip(labels, texts, strict=True):
            if limit and not siglip and self.encoder.exceeds(text, limit):
                raise _too_long(label, limit)
        encoded = self.encoder.encode(texts, max_length=limit, truncation=siglip)
        length = max(len(row["input_ids"]) for row in encoded)
        if limit and length > limit:
            longest = max(range(len(labels)), key=lambda i: len(encoded[i]["input_ids"]))
            raise _too_long(labels[longest], limit)
        length = limit if siglip and limit else length
        step = max(1, _MOST_TOKENS // length)
        for start in range(0, len(encoded), step):
            tables = self._padded(encoded[start : start + step], length)
            # What pieces must have in common to share a forward.
            yield {"texts": tables, "key": tuple(table.tobytes() for table in tables.values())}

    def _padded(
        self, encoded: Sequence[Mapping[str, list[int]]], length: int
    ) -> dict[str, np.ndarray]:
        """The model's arguments of texts, each int64 of shape (labels, length)."""
        fill = {
            # The tokenizer's, as in the pipeline: CLIP's own is another token in some configs.
            "input_ids": self.encoder.config["pad_token_id"] or 0,
            "token_type_ids": self.encoder.config["pad_token_type_id"],
        }
        tables: dict[str, np.ndarray] = {}
        for name in (name for name in self.config["input_names"] if name in encoded[0]):
            tables[name] = np.full((len(encoded), length), fill.get(name, 0), np.int64)
            for line, row in zip(tables[name], encoded, strict=True):
                line[: len(row[name])] = row[name]
        return tables

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features["pieces"]
        return pieces

    def holds(self, features: Features) -> int:
        return super().holds(features["pieces"][0]["image"])  # that all pieces share

    def cost(self, features: Features) -> int:
        return IMAGE_TOKENS  # labels are read once for all images of a forward

    def forward(
        self, engine: Engine, batch: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        alike: dict[Any, list[int]] = {}
        for i, piece in enumerate(batch):
            alike.setdefault(piece["key"], []).append(i)
        found: dict[int, RowOutput] = {}
        for places in alike.values():
            texts, images = batch[places[0]]["texts"], [batch[i]["image"] for i in places]
            for group in self.groups(images):
                part = [images[j] for j in group]
                logits = self.outputs_of(engine({**texts, **self.collate(part)}), part, params)
                found.update(zip((places[j] for j in group), logits, strict=True))
        return [found[i] for i in range(len(batch))]

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        return [{"logits": row} for row in pick(outputs, "logits_per_image", (len(part), None))]

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        """Logits of shape (candidate labels,)."""
        return {"logits": np.concatenate([output["logits"] for output in outputs])}

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        function = sigmoid if self.config["siglip"] else softmax
        for i, (row, output) in enumerate(zip(rows, outputs, strict=True), first):
            require_finite([output["logits"]], i)
            yield best_first(self._labels(i, row, params), function(output["logits"]))


def _too_long(label: str, limit: int) -> InputError:
    return InputError(
        "A label is longer than the model takes",
        where="candidate_labels",
        wanted=f"labels of at most {limit} tokens, together with hypothesis_template",
        found=reprlib.repr(label),
        hint="shorten the label or the template",
    )
