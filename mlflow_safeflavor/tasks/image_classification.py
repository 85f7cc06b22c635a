"""Images → labels with scores, as transformers' image-classification pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_safeflavor.tasks.arguments import arguments_of
from mlflow_safeflavor.tasks.classification import describe_labels
from mlflow_safeflavor.tasks.features import Features
from mlflow_safeflavor.tasks.inputs.images import read_image, record_image
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.processed import ProcessedTask

if TYPE_CHECKING:
    import torch

__all__ = ["ImageClassification"]

# Tokens that an image counts for ``max_batch_tokens``: 2 images a forward by default. On a CPU, a
# small ViT and a ResNet-50 were no faster with 4, 8 or 16; a GPU may want more.
_TOKENS = 256
_GOLDEN_SIZES = ((48, 64), (40, 40), (90, 32))


class ImageClassification(ProcessedTask):
    """Labels of an image: a file (bytes, base64, ``pathlib.Path``), a PIL image or an array.

    See ``read_image``.

    Answers: see ``rank_labels``.
    """

    name = "image-classification"
    field = "image"
    fields = ("image",)
    required = ("image",)

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return "ForImageClassification" in class_name

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return {**describe_labels(model), "arguments": arguments_of(model)}

    def golden_rows(self) -> list[Row]:
        """Squares of random colours: small as files, with edges that show how they are scaled."""
        random = np.random.default_rng(0)
        colours = [random.integers(0, 256, (h // 8, w // 8, 3), np.uint8) for h, w in _GOLDEN_SIZES]
        # uint8 of shape (height, width, 3)
        return [{"image": colour.repeat(8, axis=0).repeat(8, axis=1)} for colour in colours]

    def read(self, value: Any, where: str) -> Any:
        return read_image(value, where, self.caps)

    def record(self, value: Any, where: str) -> str:
        return record_image(value, where, self.caps)

    def cost(self, features: Features) -> int:
        return _TOKENS
