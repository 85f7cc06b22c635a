"""Images → boxes around objects, with labels and scores, as transformers' object-detection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.types import DataType

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.mlflow_compat import Array, Object, Property, answer_of
from mlflow_safeflavor.tasks.classification import labels_of
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.image import ImageTask, require_sight
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.outputs import pick, require_finite, sigmoid, softmax
from mlflow_safeflavor.tasks.params import Param

if TYPE_CHECKING:
    import torch

__all__ = ["ObjectDetection"]

_THRESHOLD = Param(
    "threshold",
    "double",
    default=0.5,
    wanted="a number from 0 to 1",
    allows=lambda value: 0 <= value <= 1,
    none_is=0.5,
)
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_OBJECT = Object(
    [
        Property("score", DataType.double),
        Property("label", DataType.string),
        Property("box", Object([Property(corner, DataType.long) for corner in _CORNERS])),
    ]
)
# Classes of processors, which in transformers know what the logits mean. Of these each query has
# one label, the best by softmax; the last logit means "no object".
_ONE_LABEL = ("Detr", "Yolos")
# Of these each query may have several, by sigmoid: the best pairs of query and label, 100 at the
# most or (0) as many as there are queries.
_MOST_PAIRS = {"ConditionalDetr": 100, "DeformableDetr": 100, "RTDetr": 0}


class ObjectDetection(ImageTask):
    """Objects in an image.

    Answers: ``objects``, a list of dicts with ``score``, ``label`` and ``box``: ``xmin``, ``ymin``,
    ``xmax`` and ``ymax`` in pixels of the image as it was sent, upright. Those with a score above
    ``threshold``, in the order of transformers' pipeline.
    """

    name = "object-detection"
    params = (_THRESHOLD,)
    answer = answer_of({"objects": Array(_OBJECT)})
    spare = frozenset({"pixel_mask"})  # YOLOS's forward swallows it in the pipeline

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith("ForObjectDetection")

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        takes = require_sight(model)
        if takes is not None and "input_ids" in takes:
            raise StructureError(
                "The model reads what to look for beside each image",
                where=f"{type(model).__name__}.forward",
                wanted="a detector that takes an image alone",
                found=", ".join(takes),
            )
        return {"arguments": takes, "labels": labels_of(model)}

    def __init__(
        self, config: Mapping[str, Any], columns: Mapping[str, str | None], processor: Any
    ) -> None:
        super().__init__(config, columns, processor)
        # Release 5 of transformers has a name of its own for the class that uses Pillow.
        self.family = type(processor).__name__.partition("ImageProcessor")[0]
        if self.family not in (*_ONE_LABEL, *_MOST_PAIRS):
            raise StructureError(
                "The processor does not say what the outputs of a detector mean",
                where=type(processor).__name__,
                wanted=" | ".join(f"{name}ImageProcessor" for name in (*_ONE_LABEL, *_MOST_PAIRS)),
                hint="pass the processor the model was trained with: processor=…",
            )

    def beside(self, readable: Any) -> dict[str, np.ndarray]:
        return {_SIZE: np.array(readable.size)}

    def collate(self, batch: Sequence[Features]) -> dict[str, np.ndarray]:
        collated = super().collate(batch)
        del collated[_SIZE]
        return collated

    def outputs_of(
        self, outputs: Mapping[str, np.ndarray], part: Sequence[Features], params: Mapping[str, Any]
    ) -> list[RowOutput]:
        labels = len(self.config["labels"]) + (self.family in _ONE_LABEL)
        logits = pick(outputs, "logits", (len(part), None, labels))
        boxes = pick(outputs, "pred_boxes", (len(part), logits.shape[1], 4), position=1)
        return [
            {"logits": of_row, "pred_boxes": places}
            for of_row, places in zip(logits, boxes, strict=True)
        ]

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, (row, output) in enumerate(zip(features, outputs, strict=True), first):
            logits, boxes = output["logits"], output["pred_boxes"]
            require_finite([logits], i)
            require_finite([boxes], i)
            scores, labels, queries = self._best(logits)
            places = _corners(boxes, row[_SIZE])[queries]
            yield {
                "objects": [
                    {
                        "score": scores[j].item(),
                        "label": self.config["labels"][labels[j]],
                        "box": dict(zip(_CORNERS, places[j].tolist(), strict=True)),
                    }
                    for j in np.flatnonzero(scores > params[_THRESHOLD.name])
                ]
            }

    def _best(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, numbers of labels and of queries, of logits of shape (queries, labels)."""
        if self.family in _ONE_LABEL:
            scores = softmax(logits)[:, :-1]
            labels = scores.argmax(axis=1)
            queries = np.arange(len(logits))
            return scores[queries, labels], labels, queries
        pairs = sigmoid(logits).reshape(-1)
        order = np.argsort(-pairs, kind="stable")[: _MOST_PAIRS[self.family] or len(logits)]
        queries, labels = np.divmod(order, logits.shape[1])
        return pairs[order], labels, queries


# Width and height of the image as it was sent; a feature that forward is not handed.
_SIZE = "original_size"


def _corners(boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Centre, width and height as parts of the image → corners in pixels, (queries, 4)."""
    centre, extent = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate([centre - 0.5 * extent, centre + 0.5 * extent], axis=1)
    # In float32 and cut off, as in the pipeline: rounded, a box would be another.
    pixels: np.ndarray = (corners * np.tile(size, 2).astype(corners.dtype)).astype(np.int64)
    return pixels
